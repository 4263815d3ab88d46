//! Graphs of small programs, each with one property that must be seen.

mod common;

use common::{assemble, block, check, compile, compile_with, function, has};
use dyni_analyzer::cfg::{self, GiveUp, KeepOriginal, Terminator};
use dyni_analyzer::image::Image;

const SWITCH: &str = r#"
    int f0(int), f1(int), f2(int), f3(int), f4(int), f5(int), f6(int), f7(int);
    __attribute__((noinline)) int pick(unsigned n, int x) {
        switch (n) {
        case 0: return f0(x) + 1; case 1: return f1(x) * 3; case 2: return f2(x) - 7; case 3: return f3(x) ^ 5;
        case 4: return f4(x) / 9; case 5: return f5(x) | 3; case 6: return f6(x) % 7; case 7: return f7(x) & 12;
        }
        return -1;
    }
    #define F(n) __attribute__((noinline)) int f##n(int x) { __asm__ volatile("" : "+r"(x)); return x + n; }
    F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7)
    int main(int argc, char **argv) { return pick(argc, argc); }
"#;

/// Every compiler, level and model puts the table somewhere else and uses other registers; each must be seen whole.
#[test]
fn a_switch_is_a_table_with_all_its_cases() {
    for compiler in ["gcc", "clang"] {
        if !has(compiler) {
            continue;
        }
        for level in ["-O0", "-O1", "-O2", "-O3", "-Os"] {
            for model in [&["-fPIE", "-pie"][..], &["-fno-pie", "-no-pie"], &["-fPIC", "-shared"]] {
                let options: Vec<&str> = [&[level][..], model].concat();
                let bytes = compile_with(compiler, SWITCH, "c", &options);
                let m = common::Module::of(Image::parse(bytes, "t").expect("a good file"));
                let g = m.graph("pick");
                assert_eq!(g.jump_tables.len(), 1, "{compiler} {options:?}: {:#?}", g.blocks);
                let table = &g.jump_tables[0];
                assert_eq!(table.targets.len(), 8, "{compiler} {options:?}");
                assert!(table.exact, "{compiler} {options:?}");
                for t in &table.targets {
                    assert!(block(&g, *t).address_taken);
                }
                let jumps = g.blocks.iter().filter(|b| matches!(b.terminator, Terminator::Indirect { .. }));
                for b in jumps {
                    assert_eq!(b.terminator, Terminator::Indirect { table: Some(0) }, "{compiler} {options:?}");
                    assert_eq!(b.successors.len(), 8);
                }
            }
        }
    }
}

/// Labels whose addresses are in a table of pointers, or of distances between labels: the blocks are all there, whether
/// the jump is understood or not.
#[test]
fn every_label_of_a_computed_goto_starts_a_block() {
    let pointers = r"
        __attribute__((noinline)) long run(const unsigned char *p) {
            static const void *const labels[] = { &&stop, &&inc, &&dec, &&dbl, &&neg };
            long v = 1;
            goto *labels[*p++];
            inc: v++; goto *labels[*p++];
            dec: v -= 2; goto *labels[*p++];
            dbl: v *= 3; goto *labels[*p++];
            neg: v = -v; goto *labels[*p++];
            stop: return v;
        }
        int main(int c, char **v) { return run((unsigned char *)v[0]); }";
    let distances = pointers
        .replace("const void *const labels[]", "const int labels[]")
        .replace(
            "{ &&stop, &&inc, &&dec, &&dbl, &&neg }",
            "{ &&stop-&&stop, &&inc-&&stop, &&dec-&&stop, &&dbl-&&stop, &&neg-&&stop }",
        )
        .replace("goto *labels[*p++]", "goto *(&&stop + labels[*p++])");
    for source in [pointers, &distances] {
        for options in [&["-O2", "-fno-gcse", "-fPIE", "-pie"][..], &["-O2", "-fno-pie", "-no-pie"], &["-O0"]] {
            let m = compile(source, "c", options);
            let g = m.graph("run");
            let taken = g.blocks.iter().filter(|b| b.address_taken).count();
            assert!(taken >= 5, "{options:?}: {taken} labels in {:#?}", g.blocks);
            let jumps = g.blocks.iter().filter(|b| matches!(b.terminator, Terminator::Indirect { .. })).count();
            assert!(jumps >= 1, "{options:?}");
        }
    }
}

#[test]
fn a_cold_part_is_another_function_and_the_way_there_an_escape() {
    let m = compile(
        r#"
        __attribute__((cold, noinline)) void complain(int);
        void complain(int x) { __builtin_printf("%d", x); }
        __attribute__((noinline)) int work(int x) {
            if (__builtin_expect(x < 0, 0)) { complain(x); complain(x + 1); x = -x; }
            return x * 3;
        }
        int main(int c, char **v) { return work(c) + work(c + 1); }"#,
        "c",
        &["-O2"],
    );
    let cold = m.symbol("work.cold");
    let f = m.function("work");
    assert!(!f.contains(cold) && m.functions.starting_at(cold).is_some());
    let g = m.graph("work");
    let leaving = |b: &&cfg::Block| matches!(b.terminator, Terminator::Conditional { taken } if taken == cold);
    let b = g.blocks.iter().find(leaving).expect("a jump to the cold part");
    assert_eq!(b.successors.len(), 1, "only the fall-through is in the function");
    // The way back from the cold part is a branch target in the middle of the function.
    assert!((1..f.size).any(|o| m.targets.is_branch_target(f.start.plus(u64::from(o)))));
}

#[test]
fn data_in_text_belongs_to_no_block() {
    let m = assemble(&function(
        "f",
        "test %edi,%edi\n js 1f\n lea 2f(%rip),%rax\n mov (%rax,%rdi),%al\n ret\n2: .quad 0x0606060606060606\n1: ud2\n .byte 6,6\n",
    ));
    let g = m.graph("f");
    let bytes: u64 = g.blocks.iter().map(|b| b.end.0 - b.start.0).sum();
    assert_eq!(bytes, g.end.0 - g.start.0 - 8 - 2);
    assert_eq!(g.blocks.last().expect("blocks").terminator, Terminator::Stop);
}

#[test]
fn code_that_calls_itself_for_its_address_stays() {
    let m = assemble(&function("f", "push %rbx\n nop\n call 1f\n1: pop %rax\n add $8,%rax\n pop %rbx\n ret"));
    let g = m.graph("f");
    let kept: Vec<_> = g.blocks.iter().filter(|b| b.keep_original.is_some()).collect();
    assert_eq!(kept.len(), 1);
    assert_eq!(kept[0].keep_original, Some(KeepOriginal::ReadsOwnAddress));
    assert_eq!(kept[0].start, kept[0].last, "only the call stays");
    assert!(kept[0].calls);
    assert!(block(&g, kept[0].end).address_taken, "it is called");
}

#[test]
fn recursion_is_an_ordinary_call() {
    let m = assemble(&function(
        "f",
        "push %rbx\n .cfi_adjust_cfa_offset 8\n call f\n pop %rbx\n .cfi_adjust_cfa_offset -8\n ret",
    ));
    let g = m.graph("f");
    assert_eq!(g.blocks.len(), 1);
    assert_eq!(g.blocks[0].keep_original, None);
    assert!(g.blocks[0].calls);
}

#[test]
fn calls_that_look_at_their_caller_stay_alone() {
    let source = r#"
        #include <dlfcn.h>
        #include <stddef.h>
        __attribute__((noinline)) void *direct(const char *n) { void *p = dlopen(n, 1); return p ? p : (void *)n; }
        __attribute__((noinline)) void *tail(const char *n) { return dlsym(NULL, n); }
        __attribute__((noinline)) void *over(const char *n) { void *p = tail(n); return p ? p : (void *)n; }
        __attribute__((noinline)) void *self(void) { return __builtin_return_address(0); }
        __attribute__((noinline)) void *asks(const char *n) { void *p = self(); return p ? p : (void *)n; }
        int main(int c, char **v) { return direct(v[0]) == over(v[0]) && asks(v[0]); }"#;
    for options in [
        &["-O2", "-fno-ipa-icf", "-fno-inline"][..],
        &["-O2", "-fno-inline", "-fno-plt"],
        &["-O2", "-fno-inline", "-fno-omit-frame-pointer", "-no-pie", "-fno-pie"],
        &["-O2", "-fno-inline", "-fPIC", "-shared"],
    ] {
        let m = compile(source, "c", options);
        for name in ["direct", "over", "asks"] {
            let g = m.graph(name);
            let kept: Vec<_> =
                g.blocks.iter().filter(|b| b.keep_original == Some(KeepOriginal::CallerIsObserved)).collect();
            assert_eq!(kept.len(), 1, "{name} {options:?}: {:#?}", g.blocks);
            assert_eq!(kept[0].start, kept[0].last, "{name} {options:?}: only the call stays");
            assert!(g.block_at(kept[0].end).is_some(), "{name} {options:?}: what follows is a block");
        }
        let tail = m.graph("tail");
        assert!(tail.blocks.iter().any(|b| b.keep_original == Some(KeepOriginal::CallerIsObserved)), "{options:?}");
        assert!(m.targets.observes_caller(m.symbol("self")), "{options:?}");
        assert!(!m.targets.observes_caller(m.symbol("direct")), "{options:?}");
    }
}

#[test]
fn instructions_that_know_their_place_stay_alone() {
    let m =
        assemble(&function("f", "push %rbx\n sub $64,%rsp\n fnstenv (%rsp)\n add $64,%rsp\n syscall\n pop %rbx\n ret"));
    let g = m.graph("f");
    let kept: Vec<_> = g.blocks.iter().filter(|b| b.keep_original == Some(KeepOriginal::Instruction)).collect();
    assert_eq!(kept.len(), 1, "a system call is an ordinary instruction");
    assert_eq!(kept[0].start, kept[0].last);
    assert_eq!(g.blocks.len(), 3);
}

#[test]
fn what_follows_a_call_that_never_returns_may_be_anything() {
    let m = assemble(&function("f", "push %rbx\n call g@PLT\n .byte 6,6,6"));
    let g = m.graph("f");
    assert_eq!(g.blocks.len(), 1);
    assert_eq!(g.blocks[0].terminator, Terminator::FallThrough);
    assert!(g.blocks[0].successors.is_empty());
    let m = assemble(&function("f", "push %rbx\n call g@PLT"));
    let g = m.graph("f");
    assert_eq!((g.blocks[0].end, g.blocks[0].terminator), (g.end, Terminator::FallThrough));
}

#[test]
fn reasons_to_give_up() {
    let m = assemble(
        &[
            function("bad", "test %edi,%edi\n je 1f\n nop\n nop\n ret\n1: .byte 6,6"),
            function("small", "xor %eax,%eax\n ret"),
            function("cut", "nop\n nop\n nop\n nop\n .byte 0x48,0xb8,1,2"),
            function("overlap", "test %edi,%edi\n je .+3\n .byte 0xb8\n nop\n nop\n nop\n nop\n ret"),
            function("compared", "mov (%rdi),%rax\n compared_label: ret\n nop"),
            function("other", "lea compared_label(%rip),%rax\n ret"),
        ]
        .concat(),
    );
    assert_eq!(m.try_graph("bad"), Err(GiveUp::BadInstruction));
    assert_eq!(m.try_graph("small"), Err(GiveUp::TooSmall));
    assert_eq!(m.try_graph("cut"), Err(GiveUp::OverlappingInstructions));
    assert_eq!(m.try_graph("overlap"), Err(GiveUp::OverlappingInstructions));
    assert_eq!(m.try_graph("compared"), Err(GiveUp::InteriorLabelObserved));
    assert!(m.try_graph("other").is_ok());
}

#[test]
fn landing_pads_stay_and_what_throws_is_known() {
    if !has("c++") {
        return;
    }
    let source = r#"
        #include <cstring>
        struct D { char *p; __attribute__((noinline)) ~D() { __asm__ volatile("" ::: "memory"); } };
        __attribute__((noinline)) void thrower(int x) { if (x > 3) throw x; __asm__ volatile(""); }
        __attribute__((noinline)) int middle(int x) { D d{nullptr}; thrower(x); return x + 1; }
        __attribute__((noinline)) int quiet(const char *s) { return strlen(s) * 3; }
        __attribute__((noinline)) int calls_quiet(const char *s) { return quiet(s) + quiet(s + 1); }
        __attribute__((noinline)) int through(int (*f)(int)) { return f(2) + 1; }
        int main(int c, char **v) {
            try { return middle(c) + calls_quiet(v[0]) + through(middle); } catch (int) { return 9; } }"#;
    let bytes = compile_with("c++", source, "cc", &["-O2", "-fno-ipa-cp", "-fno-ipa-sra"]);
    let m = common::Module::of(Image::parse(bytes, "t").expect("a good file"));
    let mangled =
        |name: &str| m.image.symbols().find(|s| s.2.contains(name) && !s.2.contains('.')).expect("a symbol").2;
    let middle = m.function(mangled("6middle"));
    assert!(middle.has_lsda && middle.has_personality);
    assert!(m.functions.landing_pad_count() >= 2);
    let mut pads = 0;
    for f in m.functions.all() {
        let Ok(g) = cfg::build(&m.image, &m.functions, &m.targets, f) else { continue };
        check(&g);
        for pad in m.functions.landing_pads_in(f.start..f.end()) {
            let b = block(&g, pad);
            assert!(b.address_taken && b.keep_original == Some(KeepOriginal::LandingPad));
            pads += 1;
        }
    }
    assert!(pads >= 2);
    let all = dyni_analyzer::refuse::may_unwind(&m.image, &m.functions, &m.targets, Default::default());
    let may = |name: &str| all.has(m.functions.index_at(m.function(mangled(name)).start).expect("it is there"));
    assert!(may("7thrower") && may("6middle") && may("7through"));
    assert!(!may("5quiet") && !may("11calls_quiet"));
    let registered = dyni_analyzer::refuse::Options { unwind_registered: true, others_throw: true };
    assert_eq!(dyni_analyzer::refuse::may_unwind(&m.image, &m.functions, &m.targets, registered).count(), 0);
}

#[test]
fn functions_of_restartable_sequences_are_known() {
    let m = assemble(
        &[
            function("seq", "nop\n1: mov (%rdi),%rax\n2: nop\n nop\n nop\n ret\n .long 0x53053053\n3: jmp 1b"),
            ".section __rseq_cs,\"aw\"\n .balign 32\n .long 0,0\n .quad seq+1, 3, seq+4\n".to_owned(),
        ]
        .concat(),
    );
    assert_eq!(m.try_graph("seq"), Err(GiveUp::Rseq));
}
