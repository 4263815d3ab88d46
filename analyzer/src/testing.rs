//! A tiny program for tests: an ELF file made here, so that every byte of it is known.

use crate::functions::Functions;
use crate::image::Image;
use crate::targets::TargetIndex;
use dyni_schema::{Branches, Host, Method, ModuleProfile, Profile, Ranges, Samples};

/// Where the code starts.
pub(crate) const TEXT: u64 = 0x1000;
/// Where `work` starts.
pub(crate) const WORK: u64 = TEXT;
/// Where `leaf` starts.
pub(crate) const LEAF: u64 = TEXT + 0x20;
/// Where `idle` starts.
pub(crate) const IDLE: u64 = TEXT + 0x30;

/// `work(n)`: a guard, a loop, a call of `leaf`, and a cold way out. `leaf`: straight. `idle`: too short to be patched.
const CODE: [u8; 0x32] = [
    0x85, 0xff, // +00 test edi, edi
    0x74, 0x0c, // +02 je +10
    0x89, 0xf8, // +04 mov eax, edi
    0xff, 0xc8, // +06 dec eax
    0x75, 0xfc, // +08 jne +06
    0xe8, 0x11, 0, 0, 0,    // +0a call leaf
    0xc3, // +0f ret
    0x31, 0xc0, // +10 xor eax, eax
    0x0f, 0x0b, // +12 ud2
    0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, //
    0x8d, 0x47, 0x01, // +20 lea eax, [rdi + 1]
    0x0f, 0x1f, 0x00, // +23 nop
    0xc3, // +26 ret
    0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, //
    0x90, // +30 nop
    0xc3, // +31 ret
];

/// The program, its functions and targets.
pub(crate) struct Program {
    pub image: Image,
    pub functions: Functions,
    pub targets: TargetIndex,
}

pub(crate) fn program() -> Program {
    let image = Image::parse(elf(), "tiny").expect("the tiny program is a valid file");
    let functions = Functions::find(&image);
    let targets = TargetIndex::build(&image, &functions);
    Program { image, functions, targets }
}

/// A recording of the tiny program without anything in it.
pub(crate) fn profile(program: &Program, method: Method) -> Profile {
    Profile {
        program: "tiny".into(),
        label: String::new(),
        method,
        method_note: String::new(),
        host: Host::default(),
        start_s: 0,
        duration_ns: 0,
        frequency_hz: 0,
        processes: 1,
        threads: 1,
        samples: 0,
        outside: 0,
        kernel: 0,
        in_cache: 0,
        lost: 0,
        modules: vec![ModuleProfile {
            build_id: program.image.build_id().clone(),
            name: "tiny".into(),
            ..ModuleProfile::default()
        }],
    }
}

/// The same with samples at these addresses, which rise.
pub(crate) fn sampled(program: &Program, at: &[(u64, u64)]) -> Profile {
    let mut p = profile(program, Method::Clock);
    p.modules[0].samples = Samples { addr: at.iter().map(|s| s.0).collect(), count: at.iter().map(|s| s.1).collect() };
    p
}

/// The same with these branches (from, to, count) and ranges (first, last, count), both sorted.
pub(crate) fn branched(
    program: &Program,
    method: Method,
    branches: &[(u64, u64, u64)],
    ranges: &[(u64, u64, u64)],
) -> Profile {
    let mut p = profile(program, method);
    p.modules[0].branches = Branches {
        from: branches.iter().map(|b| b.0).collect(),
        to: branches.iter().map(|b| b.1).collect(),
        count: branches.iter().map(|b| b.2).collect(),
        mispredicted: vec![0; branches.len()],
    };
    p.modules[0].ranges = Ranges {
        start: ranges.iter().map(|r| r.0).collect(),
        end: ranges.iter().map(|r| r.1).collect(),
        count: ranges.iter().map(|r| r.2).collect(),
    };
    p
}

/// One executable segment at [`TEXT`] and a symbol table.
fn elf() -> Vec<u8> {
    let strings = b"\0work\0leaf\0idle\0";
    let names = b"\0.text\0.symtab\0.strtab\0.shstrtab\0";
    let mut symbols = vec![0u8; 24];
    for (name, value, size) in [(1u32, WORK, 0x14u64), (6, LEAF, 7), (11, IDLE, 2)] {
        symbols.extend(name.to_le_bytes());
        symbols.extend([0x12, 0, 1, 0]);
        symbols.extend(value.to_le_bytes());
        symbols.extend(size.to_le_bytes());
    }
    let mut file = vec![0u8; TEXT as usize];
    file.extend(CODE);
    let mut parts = Vec::new();
    for part in [&symbols[..], strings, names] {
        file.resize(file.len().next_multiple_of(8), 0);
        parts.push((file.len() as u64, part.len() as u64));
        file.extend(part);
    }
    file.resize(file.len().next_multiple_of(8), 0);
    let sections = file.len() as u64;
    // name, type, flags, address, offset, size, link, info, align, entry size
    let mut section = |name: u32, kind: u32, flags: u64, at: u64, part: (u64, u64), link: u32, info: u32, each: u64| {
        file.extend(name.to_le_bytes());
        file.extend(kind.to_le_bytes());
        for word in [flags, at, part.0, part.1] {
            file.extend(word.to_le_bytes());
        }
        file.extend(link.to_le_bytes());
        file.extend(info.to_le_bytes());
        file.extend(8u64.to_le_bytes());
        file.extend(each.to_le_bytes());
    };
    section(0, 0, 0, 0, (0, 0), 0, 0, 0);
    section(1, 1, 6, TEXT, (TEXT, CODE.len() as u64), 0, 0, 0);
    section(7, 2, 0, 0, parts[0], 3, 1, 24);
    section(15, 3, 0, 0, parts[1], 0, 0, 0);
    section(23, 3, 0, 0, parts[2], 0, 0, 0);

    let mut header = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    header.extend([3, 0, 62, 0, 1, 0, 0, 0]);
    for word in [0, 64, sections] {
        header.extend(u64::to_le_bytes(word));
    }
    header.extend([0; 4]);
    for half in [64u16, 56, 1, 64, 5, 4] {
        header.extend(half.to_le_bytes());
    }
    // One PT_LOAD, readable and executable.
    header.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for word in [TEXT, TEXT, TEXT, CODE.len() as u64, CODE.len() as u64, 0x1000] {
        header.extend(word.to_le_bytes());
    }
    file[..header.len()].copy_from_slice(&header);
    file
}
