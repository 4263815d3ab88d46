//! Unwind data for copies: equal to the originals' for whole stock binaries, and good enough to throw through.

mod unwinding;

use dyni_applier::unwind::debugger::DebugFrame;
use dyni_applier::unwind::{self, UnwindSection};
use dyni_schema::LinkAddr;
use std::collections::BTreeMap;
use unwinding::{File, Module};

/// Where the files would be loaded.
const BIAS: u64 = 0x7f12_3456_7000;

/// Every function of a file, its blocks scrambled: unwind data are made for the copies and found equal.
fn whole(path: &str) {
    let Ok(bytes) = std::fs::read(path) else {
        println!("SKIPPED: {path} is not installed");
        return;
    };
    let module = Module::parse(bytes, path);
    let room = 256 << 20;
    let cache = LinkAddr(module.image.base().0 & !4095).offset(-room);
    let at = cache.offset(-(512 << 20));
    let lowered = module.lower(cache, room as u64);
    let mut reasons: BTreeMap<&str, u32> = BTreeMap::new();
    for refusal in &lowered.refused {
        *reasons.entry(refusal.text()).or_default() += 1;
    }
    let image = &module.image;
    let start = std::time::Instant::now();
    let section =
        unwind::build(image, &module.functions, &lowered.emission, &File(image), cache, at).expect("it can be made");
    let built = start.elapsed();
    unwind::check(image, &module.functions, &lowered.emission, &File(image), &section, cache, at).expect("it is right");
    let mut debugger = DebugFrame::default();
    debugger.add(image, &module.functions, &lowered.emission, &File(image), cache, BIAS);
    assert_eq!(debugger.left_out, 0, "a debugger needs less than an unwinder");
    assert_same_rows(&section, at, &debugger.into_bytes());
    println!(
        "{path}: {} functions, {} with unwind data refused {reasons:?}, {} copied; {} entries, {} tables, {} bytes for \
         {} of code; made in {built:?}, checked in {:?}",
        module.functions.len(),
        lowered.refused.len(),
        lowered.copied,
        section.entries,
        section.tables,
        section.bytes.len(),
        lowered.emission.code.len(),
        start.elapsed() - built,
    );
    assert!(lowered.refused.len() * 100 < module.functions.len(), "hardly any function is refused");
}

/// A debugger, which reads run addresses, is told the same as the process's unwinder, of which the checker has approved.
fn assert_same_rows(section: &UnwindSection, at: LinkAddr, debugger: &[u8]) {
    let mut told = gimli::EhFrame::new(&section.bytes[..section.frames_size as usize], gimli::LittleEndian);
    told.set_address_size(8);
    let bases = gimli::BaseAddresses::default().set_eh_frame(at.0);
    let told = entries(&told, &bases, 0);
    assert_eq!(told.len(), section.entries);
    let mut debugger = gimli::DebugFrame::new(debugger, gimli::LittleEndian);
    debugger.set_address_size(8);
    assert!(entries(&debugger, &bases, BIAS) == told, "the rows differ");
}

type Told = BTreeMap<u64, (u64, bool, Vec<String>)>;

/// By link address: each entry's length, whether it is a signal's frame, and its call frame instructions.
fn entries<'a, S>(section: &S, bases: &gimli::BaseAddresses, bias: u64) -> Told
where
    S: gimli::UnwindSection<gimli::EndianSlice<'a, gimli::LittleEndian>>,
{
    let mut found = BTreeMap::new();
    let mut entries = section.entries(bases);
    while let Some(entry) = entries.next().expect("the section can be read") {
        let gimli::CieOrFde::Fde(partial) = entry else { continue };
        let fde = partial.parse(S::cie_from_offset).expect("the entry can be read");
        assert_eq!((fde.cie().code_alignment_factor(), fde.cie().data_alignment_factor()), (1, -8));
        let mut list = Vec::new();
        let mut instructions = fde.instructions(section, bases);
        while let Some(instruction) = instructions.next().expect("the entry can be read") {
            use gimli::CallFrameInstruction::{DefCfaExpression, Expression, Nop, ValExpression};
            let text = match &instruction {
                // Padding, of which there is more or less.
                Nop => continue,
                // They say where in the section their bytes are, which is no matter.
                DefCfaExpression { expression: e } => format!("cfa {:?}", e.get(section)),
                Expression { register, expression: e } => format!("{register:?} at {:?}", e.get(section)),
                ValExpression { register, expression: e } => format!("{register:?} is {:?}", e.get(section)),
                plain => format!("{plain:?}"),
            };
            list.push(text);
        }
        let entry = (fde.len(), fde.is_signal_trampoline(), list);
        assert!(found.insert(fde.initial_address().wrapping_sub(bias), entry).is_none(), "an entry is there twice");
    }
    found
}

#[test]
fn whole_stock_libraries() {
    for path in [
        "/lib/x86_64-linux-gnu/libc.so.6",
        "/lib/x86_64-linux-gnu/libgcc_s.so.1",
        "/usr/lib/x86_64-linux-gnu/libstdc++.so.6",
        "/usr/bin/redis-server",
        "/usr/bin/python3.11",
    ] {
        whole(path);
    }
    let mut versions: Vec<_> = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten().collect();
    versions.sort_by_key(std::fs::DirEntry::path);
    whole(&versions.last().map_or("postgres".into(), |v| v.path().join("bin/postgres").display().to_string()));
    // This very test: Rust, with its own personality.
    whole(&std::env::current_exe().unwrap().display().to_string());
}

#[test]
fn whole_mariadb() {
    whole("/usr/sbin/mariadbd");
}

/// The scenarios of `unwinding/throws.cc`, played by originals and by copies.
mod thrown {
    use super::unwinding::{File, Module};
    use dyni_applier::check::Originals;
    use dyni_applier::place::AddressSpace;
    use dyni_applier::unwind;
    use dyni_schema::{LinkAddr, RunAddr};
    use std::ffi::{CStr, CString, c_char, c_int, c_long, c_void};
    use std::path::{Path, PathBuf};
    use std::process::Command;

    const SCENARIOS: c_int = 13;
    const KINDS: c_int = 12;
    const ROOM: u64 = 2 << 20;

    unsafe extern "C" {
        fn __register_frame_info(begin: *const c_void, object: *mut c_void);
        fn __deregister_frame_info(begin: *const c_void) -> *mut c_void;
    }

    type Run = unsafe extern "C-unwind" fn(c_int, c_int) -> c_long;
    type Trace = unsafe extern "C" fn() -> *const c_char;

    /// Compiles the three files; `None`, and a line that says so, without the compiler.
    pub fn compile(dir: &Path, compiler: &str, flags: &[&str], shared: bool) -> Option<(PathBuf, PathBuf)> {
        let source = |name: &str, text: &str| {
            let path = dir.join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let throws = source("throws.cc", include_str!("unwinding/throws.cc"));
        let other = source("other.cc", include_str!("unwinding/other.cc"));
        let cleanup = source("cleanup.c", include_str!("unwinding/cleanup.c"));
        let (main, library, object) = (dir.join("throws.so"), dir.join("libother.so"), dir.join("cleanup.o"));
        let run = |command: &mut Command| match command.status() {
            Ok(status) => assert!(status.success(), "{command:?}"),
            Err(e) => println!("SKIPPED: {compiler}: {e}"),
        };
        let found = Command::new(compiler).arg("--version").output().is_ok_and(|o| o.status.success());
        if !found {
            println!("SKIPPED: {compiler} is not installed");
            return None;
        }
        let pic = if shared { "-fPIC" } else { "-fno-pic" };
        run(Command::new(compiler).args(["-O2", "-w", "-fPIC", "-shared"]).arg(&other).arg("-o").arg(&library));
        let c_flags = flags.iter().filter(|f| !f.starts_with("-std="));
        run(Command::new(compiler)
            .args(c_flags)
            .args(["-x", "c", "-fexceptions", pic, "-c"])
            .arg(&cleanup)
            .arg("-o")
            .arg(&object));
        run(Command::new(compiler)
            .args(flags)
            .args(["-w", "-fvisibility=hidden", "-pthread", pic, if shared { "-shared" } else { "-no-pie" }])
            .args(if shared { [].as_slice() } else { ["-DMAIN"].as_slice() })
            .arg(&throws)
            .arg(&object)
            .arg(&library)
            .arg(format!("-Wl,-rpath,{}", dir.display()))
            .arg("-o")
            .arg(&main));
        Some((main, library))
    }

    fn symbol(library: *mut c_void, name: &str) -> *mut c_void {
        let name = CString::new(name).unwrap();
        // SAFETY: the handle is of a library that stays open, the name ends with a zero.
        let found = unsafe { libc::dlsym(library, name.as_ptr()) };
        assert!(!found.is_null());
        found
    }

    fn play(run: Run, trace: Trace) -> Vec<(c_long, String)> {
        let each = (0..SCENARIOS).flat_map(|s| (0..KINDS).map(move |k| (s, k)));
        each.map(|(scenario, kind)| {
            // SAFETY: `run` takes two numbers, catches all it throws, and may be called again; `trace` gives a text that
            // stays as it is until the next run.
            unsafe { (run(scenario, kind), CStr::from_ptr(trace()).to_string_lossy().into_owned()) }
        })
        .collect()
    }

    fn map(at: RunAddr, bytes: &[u8], protection: c_int) {
        let len = bytes.len().next_multiple_of(4096);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: a new mapping where nothing is mapped, filled before anybody knows of it.
        unsafe {
            let place = std::ptr::without_provenance_mut(at.0 as usize);
            let mapped = libc::mmap(place, len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            assert_eq!(mapped, place);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), mapped.cast(), bytes.len());
            assert_eq!(libc::mprotect(mapped, len, protection), 0);
        }
    }

    /// Makes the originals jump to their copies, as an apply does.
    fn patch(module: &Module, emission: &dyni_applier::lower::Emission, cache: LinkAddr, bias: u64) -> usize {
        let mut patched = 0;
        for function in module.functions.all() {
            let Some(block) = emission.block_at(function.start) else { continue };
            let Ok(cfg) = dyni_analyzer::cfg::build(&module.image, &module.functions, &module.targets, function) else {
                continue;
            };
            if module.targets.patchable(&module.image, &cfg, function.start).is_err()
                || emission.escapes.iter().any(|e| *e > function.start && *e < function.start.plus(5))
            {
                continue;
            }
            let distance = cache.plus(block.copy.0).distance(function.start.plus(5)) as i32;
            let [a, b, c, d] = distance.to_le_bytes();
            let at = function.start.run(bias).0 as usize;
            // SAFETY: text of a library that only this test has, in which no thread is now.
            unsafe {
                let page = std::ptr::without_provenance_mut(at & !4095);
                assert_eq!(libc::mprotect(page, 8192, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC), 0);
                let text = std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut::<u8>(at), 5);
                text.copy_from_slice(&[0xe9, a, b, c, d]);
            }
            patched += 1;
        }
        patched
    }

    pub fn compare(compiler: &str, flags: &[&str]) {
        let dir = tempfile::tempdir().unwrap();
        let Some((path, _)) = compile(dir.path(), compiler, flags, true) else { return };
        let module = Module::parse(std::fs::read(&path).unwrap(), "throws.so");
        let name = CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
        // SAFETY: a library of our own making whose initialisers do nothing but initialise.
        let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        assert!(!library.is_null());
        // SAFETY: the functions have these types.
        let (run, trace) = unsafe {
            (
                std::mem::transmute::<*mut c_void, Run>(symbol(library, "run")),
                std::mem::transmute::<*mut c_void, Trace>(symbol(library, "last_trace")),
            )
        };
        let expected = play(run, trace);
        assert!(expected.iter().filter(|e| e.1.contains('-')).count() > 100);

        let maps = dyni_collector::maps::mappings(std::process::id() as i32).unwrap();
        let mine: Vec<_> = maps.iter().filter(|m| m.path == path).collect();
        let span = mine[0].range.start..mine.last().unwrap().range.end;
        let bias = span.start.wrapping_sub(module.image.base().0);
        let hole = AddressSpace::of(&maps).holes(&span, 2 * ROOM, 0, 1)[0];
        let (cache, at) = (hole.link(bias), hole.plus(ROOM).link(bias));
        let lowered = module.lower(cache, ROOM);
        assert_eq!(lowered.refused, []);
        let (emission, originals) = (&lowered.emission, &File(&module.image) as &dyn Originals);
        let section = unwind::build(&module.image, &module.functions, emission, originals, cache, at).unwrap();
        unwind::check(&module.image, &module.functions, emission, originals, &section, cache, at).unwrap();
        map(hole, &emission.code, libc::PROT_READ | libc::PROT_EXEC);
        map(hole.plus(ROOM), &section.bytes, libc::PROT_READ);
        let begin = std::ptr::without_provenance::<c_void>(hole.plus(ROOM).0 as usize);
        let mut object = [0u64; 16];
        // SAFETY: the section is mapped and ends with an end mark; the object outlives the registration.
        unsafe { __register_frame_info(begin, object.as_mut_ptr().cast()) };

        let original = LinkAddr((run as usize as u64).wrapping_sub(bias));
        let copy = hole.plus(emission.block_at(original).expect("`run` is copied").copy.0);
        // SAFETY: the checked copy of `run`.
        let copied: Run = unsafe { std::mem::transmute(copy.0 as usize) };
        let agree = |what: &str, got: Vec<(c_long, String)>| {
            for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                let (scenario, kind) = (i as c_int / KINDS, i as c_int % KINDS);
                assert_eq!(got, expected, "{what} {compiler} {flags:?}, scenario {scenario}, kind {kind}");
            }
        };
        agree("copy", play(copied, trace));
        let patched = patch(&module, emission, cache, bias);
        assert!(patched > 20, "{patched}");
        agree("patched", play(run, trace));
        // SAFETY: it is registered, and none of its frames is on any stack.
        assert!(!unsafe { __deregister_frame_info(begin) }.is_null());
        println!("{compiler} {flags:?}: {} entries, {} tables, {patched} patched", section.entries, section.tables);
        // The library and the copies stay: exceptions' types are in the one, return addresses of nobody in the other.
    }
}

#[test]
fn exceptions_pass_through_copies() {
    const FAULTS: &[&str] = &["-DFAULTS=1", "-fnon-call-exceptions"];
    let variants: &[&[&str]] = &[
        &["-O0", "-std=c++14"],
        &["-O1", "-std=c++14", "-fno-omit-frame-pointer"],
        &["-O2", "-std=c++14", "-fcf-protection=full"],
        &["-Os", "-std=c++14"],
        &["-O3", "-std=c++20"],
    ];
    for flags in variants {
        thrown::compare("g++", &[flags, FAULTS].concat());
        thrown::compare("clang++", &[flags, ["-DFAULTS=0"].as_slice()].concat());
    }
}

/// A few bits of every part of the section turned over: the checker sees it, or it was padding.
#[test]
fn the_checker_sees_a_flipped_bit() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ["-O2", "-std=c++14", "-DFAULTS=0"];
    let Some((program, _)) = thrown::compile(dir.path(), "g++", &flags, false) else { return };
    let module = Module::parse(std::fs::read(program).unwrap(), "program");
    let cache = LinkAddr(0x20_0000);
    let at = LinkAddr(0x10_0000);
    let lowered = module.lower(cache, 1 << 20);
    let (image, functions) = (&module.image, &module.functions);
    let section = unwind::build(image, functions, &lowered.emission, &File(image), cache, at).unwrap();
    let check =
        |section: &UnwindSection| unwind::check(image, functions, &lowered.emission, &File(image), section, cache, at);
    check(&section).unwrap();
    let (mut tried, mut missed) = (0, Vec::new());
    for i in (0..section.bytes.len()).step_by(5) {
        let mut changed = section.clone();
        changed.bytes[i] ^= 1 << (i % 8);
        tried += 1;
        if check(&changed).is_ok() {
            missed.push(i);
        }
    }
    // In the frames nothing may be other than it is but the zeros at the end of an entry, and on which side of a jump that
    // only the copy has the rules change. In the tables, what only other parts of a function need is not asked for.
    let (frames, tables) = missed.split_at(missed.partition_point(|&i| (i as u64) < section.frames_size));
    println!("{tried} bits, not seen: {} in frames, {} in tables", frames.len(), tables.len());
    let unread: Vec<_> = frames.iter().filter(|i| section.bytes[**i] != 0).collect();
    assert!(unread.len() * 200 < tried, "{unread:?}");
    assert!(tables.len() * 12 < tried, "{tables:?}");
}

/// Damage anywhere in a file's unwind data is refused, or makes other data, but nothing else happens.
#[test]
fn damaged_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ["-O2", "-std=c++14", "-DFAULTS=0"];
    let Some((program, _)) = thrown::compile(dir.path(), "g++", &flags, true) else { return };
    let whole = std::fs::read(program).unwrap();
    let image = dyni_analyzer::image::Image::parse(whole.clone(), "program").unwrap();
    let parts =
        [".eh_frame", ".gcc_except_table"].map(|name| image.section(name).map(|s| (s.address, s.size)).unwrap());
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let (mut refused, mut made, mut failed) = (0, 0, 0);
    for round in 0..400 {
        let mut bytes = whole.clone();
        let (address, size) = parts[round % 2];
        let start = image.file_offset(address).unwrap().0 as usize;
        for _ in 0..1 + next() % 6 {
            let at = start + (next() % size) as usize;
            bytes[at] = [0, 0xff, 0x80, 0x7f, next() as u8][(next() % 5) as usize];
        }
        let module = Module::parse(bytes, "program");
        let cache = module.image.base().offset(-(64 << 20));
        let lowered = module.lower(cache, 1 << 20);
        refused += lowered.refused.len();
        let (image, functions) = (&module.image, &module.functions);
        let at = cache.offset(-(1 << 20));
        match unwind::build(image, functions, &lowered.emission, &File(image), cache, at) {
            Ok(section) => {
                unwind::check(image, functions, &lowered.emission, &File(image), &section, cache, at).unwrap();
                made += 1;
            }
            Err(_) => failed += 1,
        }
    }
    println!("{refused} functions refused, {made} sections made, {failed} not");
    assert!(refused > 50 && made > 50);
}

#[test]
fn a_program_at_a_fixed_address() {
    let dir = tempfile::tempdir().unwrap();
    if let Some((program, _)) = thrown::compile(dir.path(), "g++", &["-O2", "-std=c++14", "-DFAULTS=0"], false) {
        whole(program.to_str().unwrap());
    }
}
