//! What is read from files: whole ones, stripped ones, damaged ones.

mod common;

use common::{Module, assemble, check, compile, compile_with, function};
use dyni_analyzer::cfg;
use dyni_analyzer::functions::{Functions, function_hash};
use dyni_analyzer::image::{Image, ImageError, Kind};
use proptest::prelude::*;
use std::sync::OnceLock;

const PROGRAM: &str = r#"
    #include <stdio.h>
    #include <string.h>
    __attribute__((noinline)) int work(int x, const char *s) {
        switch (x) { case 0: return strlen(s); case 1: return puts(s); case 2: return x * 7; case 3: return s[1];
                     case 4: return x / 3; case 5: return s[2] + 1; case 6: return x ^ 9; }
        return 0;
    }
    int (*volatile pointer)(int, const char *) = work;
    int main(int c, char **v) { return pointer(c, v[0]); }"#;

#[test]
fn every_kind_of_module_is_told() {
    for (kind, options) in [
        (Kind::Pie, &["-O2", "-fPIE", "-pie", "-Wl,--build-id"][..]),
        (Kind::Exec, &["-O2", "-fno-pie", "-no-pie"]),
        (Kind::Exec, &["-O2", "-static"]),
        (Kind::StaticPie, &["-O2", "-static-pie"]),
        (Kind::Shared, &["-O2", "-fPIC", "-shared"]),
    ] {
        let m = compile(PROGRAM, "c", options);
        assert_eq!(m.image.kind(), kind, "{options:?}");
        assert!(!m.image.build_id().0.is_empty());
        assert!(m.image.is_executable(m.symbol("work")));
        assert_eq!(m.function("work").name(&m.image).as_deref(), Some("work"));
        assert_eq!(m.graph("work").jump_tables.len(), 1, "{options:?}");
        if kind != Kind::Exec {
            assert!(m.image.code_pointers().any(|p| p.target == m.symbol("work")), "{options:?}");
        }
        if !options.contains(&"-static") && kind != Kind::StaticPie {
            assert!(m.image.plt().any(|p| p.1 == "puts"), "{options:?}");
            assert!(m.image.imports().any(|n| n == "puts"), "{options:?}");
            assert_eq!(m.image.needed(), ["libc.so.6"], "{options:?}");
        }
    }
}

#[test]
fn compact_relocations_are_read() {
    let options = ["-O2", "-fPIE", "-pie", "-Wl,-z,pack-relative-relocs"];
    let m = compile(PROGRAM, "c", &options);
    assert!(m.image.code_pointers().any(|p| p.target == m.symbol("work") && p.slot == m.symbol("pointer")));
}

/// Without section headers the same functions, imports and graphs are found.
#[test]
fn section_headers_are_not_needed() {
    let mut bytes = compile_with("cc", PROGRAM, "c", &["-O2", "-fPIE", "-pie", "-Wl,-z,norelro"]);
    let whole = Module::of(Image::parse(bytes.clone(), "t").expect("a good file"));
    bytes[0x28..0x30].fill(0);
    bytes[0x3a..0x40].fill(0);
    let bare = Module::of(Image::parse(bytes, "t").expect("a good file"));
    assert!(bare.image.sections().is_empty());
    assert_eq!(whole.functions.all(), bare.functions.all());
    assert_eq!(whole.image.build_id(), bare.image.build_id());
    assert!(whole.image.plt().eq(bare.image.plt()));
    assert!(whole.image.code_pointers().eq(bare.image.code_pointers()));
    for f in whole.functions.all() {
        let of = |m: &Module| cfg::build(&m.image, &m.functions, &m.targets, f);
        assert_eq!(of(&whole), of(&bare));
        assert_eq!(function_hash(&whole.image, f), function_hash(&bare.image, f));
    }
}

#[test]
fn a_file_that_is_no_module_is_an_error_in_words() {
    let error = |bytes: &[u8]| Image::parse(bytes.to_vec(), "x").expect_err("not a module");
    assert_eq!(error(b"#!/bin/sh\n"), ImageError::NotElf("x".to_owned()));
    assert_eq!(error(b""), ImageError::NotElf("x".to_owned()));
    assert!(matches!(error(b"\x7fELF"), ImageError::Damaged { .. }));
    let good = compile_with("cc", PROGRAM, "c", &["-O2"]);
    let truncated = error(&good[..good.len() / 4]);
    assert!(matches!(truncated, ImageError::Damaged { .. }), "{truncated}");
    assert_eq!(truncated.to_string(), "x is damaged: a segment lies outside the file (is it truncated?)");
    let mut other = good.clone();
    other[18] = 183;
    assert_eq!(error(&other), ImageError::WrongMachine("x".to_owned()));
    let object = compile_with("cc", PROGRAM, "c", &["-c"]);
    assert_eq!(error(&object), ImageError::WrongType("x".to_owned()));
}

#[test]
fn a_function_keeps_its_hash_where_it_is_moved_but_not_when_it_is_changed() {
    let body = |n: u32| format!("lea data(%rip),%rax\n call g@PLT\n cmp ${n},%eax\n je 1f\n jmp g@PLT\n1: ret");
    let build = |before: &str, n: u32| {
        assemble(&[function("a", before), function("f", &body(n)), ".data\ndata: .quad 1\n".to_owned()].concat())
    };
    let hash = |m: &Module| function_hash(&m.image, &m.function("f"));
    let first = hash(&build("ret", 7));
    assert_eq!(first, hash(&build(".fill 5000,1,0x90\n ret", 7)));
    assert_ne!(first, hash(&build("ret", 8)));
    // Addresses as plain numbers, in a module at a fixed address.
    let fixed = |before: &str, n: u32| {
        let f = function("f", &format!("mov $data,%edi\n mov data(,%rdi,8),%rax\n mov ${n},%ecx\n ret"));
        let source = [
            function("_start", before),
            f,
            ".data\ndata: .quad 1\n.section .note.GNU-stack,\"\",@progbits\n".to_owned(),
        ];
        let m = compile(&source.concat(), "S", &["-static", "-nostdlib", "-no-pie"]);
        hash(&m)
    };
    assert_eq!(fixed("ret", 7), fixed(".fill 9000,1,0x90\n ret", 7));
    assert_ne!(fixed("ret", 7), fixed("ret", 8));
}

/// The same result with one thread as with many.
#[test]
fn the_number_of_threads_does_not_matter() {
    let Some(image) = common::stock("/usr/sbin/nginx") else { return };
    let all = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| {
            let m = Module::of(image.clone());
            let graphs: Vec<_> =
                m.functions.all().iter().map(|f| cfg::build(&m.image, &m.functions, &m.targets, f)).collect();
            (m.targets.counts(), graphs)
        })
    };
    assert!(all(1) == all(3));
}

fn look_at_everything(bytes: Vec<u8>) {
    let Ok(image) = Image::parse(bytes, "x") else { return };
    let functions = Functions::find(&image);
    let m = Module { targets: dyni_analyzer::targets::TargetIndex::build(&image, &functions), image, functions };
    for f in m.functions.all().iter().take(200) {
        if let Ok(g) = cfg::build(&m.image, &m.functions, &m.targets, f) {
            check(&g);
            for b in &g.blocks {
                let _ = m.targets.patchable(&m.image, &g, b.start);
            }
        }
        let _ = function_hash(&m.image, f);
        let _ = m.image.name_of(f.start);
    }
    let _ = dyni_analyzer::refuse::module_refusal(&m.image);
    let _ = dyni_analyzer::refuse::may_unwind(&m.image, &m.functions, &m.targets, Default::default());
}

fn sample(i: usize) -> &'static [u8] {
    static SAMPLES: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    let samples = SAMPLES.get_or_init(|| {
        let cxx = "struct D { ~D(); }; void f(); int main() { try { f(); } catch (int) { return 1; } return 0; } void f() { throw 1; }";
        vec![
            compile_with("cc", PROGRAM, "c", &["-O2", "-fPIE", "-pie"]),
            compile_with("cc", PROGRAM, "c", &["-O1", "-no-pie", "-fno-pie"]),
            compile_with("c++", cxx, "cc", &["-O2"]),
        ]
    });
    &samples[i % samples.len()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn random_bytes_do_no_harm(mut bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        if bytes.len() >= 20 {
            bytes[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0\x3e\0");
        }
        look_at_everything(bytes);
    }

    /// Bytes of a good file are changed: most often in the headers and tables, where it matters.
    #[test]
    fn damaged_files_do_no_harm(
        which in 0usize..3,
        changes in proptest::collection::vec((any::<u32>(), any::<u8>(), any::<bool>()), 1..40),
        end in proptest::option::of(any::<u32>()),
    ) {
        let mut bytes = sample(which).to_vec();
        let len = bytes.len();
        for (at, value, early) in changes {
            bytes[at as usize % if early { len.min(0x800) } else { len }] = value;
        }
        if let Some(end) = end {
            bytes.truncate(end as usize % len);
        }
        look_at_everything(bytes);
    }
}
