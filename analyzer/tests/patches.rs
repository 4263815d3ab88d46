//! Where a patch may be written, and where not.

mod common;

use common::{assemble, compile, function};
use dyni_analyzer::targets::PatchRefusal;

/// Whether the 5 bytes at a label may be overwritten, in a function whose text is `body` (the label is `at`).
fn patchable(body: &str) -> Result<(), PatchRefusal> {
    let m = assemble(&function("f", body));
    m.targets.patchable(&m.image, &m.graph("f"), m.symbol("at"))
}

#[test]
fn whole_instructions_that_are_only_fallen_into_may_go() {
    assert_eq!(patchable("at: mov $1,%eax\n ret"), Ok(()));
    assert_eq!(patchable("at: push %rbp\n mov %rsp,%rbp\n push %rbx\n nop\n pop %rbx\n pop %rbp\n ret"), Ok(()));
    assert_eq!(patchable("at: test %edi,%edi\n je 1f\n nop\n nop\n1: ret"), Ok(()));
    // The end of the last instruction may stick out, and a call may end exactly at the end of the patch.
    assert_eq!(patchable("at: nop\n movabs $0x1122334455667788,%rax\n ret"), Ok(()));
    assert_eq!(patchable("at: call g@PLT\n ret"), Ok(()));
    // Padding that nothing reaches may go with what is before it.
    assert_eq!(patchable("test %edi,%edi\n je 1f\n nop\n at: ret\n .byte 0x90,0x90,0x90,0x90\n1: nop\n ret"), Ok(()));
}

#[test]
fn the_bytes_must_lie_in_the_function_and_in_one_page() {
    assert_eq!(patchable("nop\n nop\n nop\n nop\n at: xor %eax,%eax\n ret"), Err(PatchRefusal::OutsideFunction));
    let at_page_end = |room: u32| format!(".p2align 12\n nop\n .fill {},1,0x90\n at: mov $1,%eax\n ret", 4095 - room);
    assert_eq!(patchable(&at_page_end(5)), Ok(()));
    assert_eq!(patchable(&at_page_end(4)), Err(PatchRefusal::CrossesPage));
}

#[test]
fn nothing_may_branch_into_them() {
    assert_eq!(patchable("at: nop\n1: nop\n nop\n nop\n nop\n jmp 1b"), Err(PatchRefusal::BranchTarget));
    assert_eq!(
        patchable("nop\n1: nop\n dec %edi\n at: je 1b\n2: nop\n nop\n nop\n jns 2b\n ret"),
        Err(PatchRefusal::BranchTarget)
    );
    // By another function.
    let m = assemble(&[function("f", "at: nop\n inner: nop\n nop\n nop\n ret"), function("g", "jmp inner")].concat());
    assert_eq!(m.targets.patchable(&m.image, &m.graph("f"), m.symbol("at")), Err(PatchRefusal::BranchTarget));
    // By code that has no unwind data.
    let m =
        assemble(&[function("f", "at: nop\n inner: nop\n nop\n nop\n ret"), "nop\n jmp inner\n".to_owned()].concat());
    assert_eq!(m.targets.patchable(&m.image, &m.graph("f"), m.symbol("at")), Err(PatchRefusal::BranchTarget));
    // By a label in data, next to an indirect jump.
    let labels = ".data\n .quad inner\n";
    let m = assemble(&[function("f", "at: nop\n inner: nop\n nop\n nop\n jmp *%rdi"), labels.to_owned()].concat());
    assert_eq!(m.targets.patchable(&m.image, &m.graph("f"), m.symbol("at")), Err(PatchRefusal::BranchTarget));
}

#[test]
fn nothing_may_return_or_resume_inside_them() {
    assert_eq!(patchable("at: nop\n call *%rdi\n nop\n nop\n ret"), Err(PatchRefusal::ReturnPoint));
    assert_eq!(patchable("at: nop\n nop\n syscall\n nop\n ret"), Err(PatchRefusal::SystemCall));
    assert_eq!(patchable("at: nop\n nop\n nop\n nop\n syscall\n ret\n nop"), Err(PatchRefusal::SystemCall));
    assert_eq!(patchable("nop\n syscall\n at: mov %rax,%rdi\n nop\n nop\n ret"), Ok(()));
    assert_eq!(patchable("at: nop\n int $0x80\n nop\n nop\n ret"), Err(PatchRefusal::SystemCall));
}

#[test]
fn data_and_the_middle_of_instructions_are_not_code() {
    assert_eq!(patchable("test %edi,%edi\n je 1f\n at: ret\n .byte 1,2,3,4\n1: nop\n ret"), Err(PatchRefusal::Data));
    let m = assemble(&function("f", "mov $1,%eax\n mov $2,%eax\n ret"));
    let g = m.graph("f");
    assert_eq!(m.targets.patchable(&m.image, &g, g.start.plus(1)), Err(PatchRefusal::NotAnInstruction));
    assert_eq!(m.targets.patchable(&m.image, &g, g.end), Err(PatchRefusal::NotAnInstruction));
}

/// A table that is not recognised (its base takes a detour through the stack) still counts.
#[test]
fn entries_of_tables_that_are_not_understood_are_branch_targets() {
    let m = assemble(
        &[
            function(
                "f",
                "lea table(%rip),%rax\n mov %rax,-8(%rsp)\n mov -8(%rsp),%rdx\n movslq (%rdx,%rdi,4),%rax\n add %rdx,%rax\n \
                 jmp *%rax\n one: nop\n two: nop\n nop\n nop\n nop\n nop\n ret",
            ),
            ".section .rodata\n .balign 4\ntable: .long one-table, two-table\n".to_owned(),
        ]
        .concat(),
    );
    let g = m.graph("f");
    assert!(g.jump_tables.is_empty());
    assert!(m.targets.is_branch_target(m.symbol("two")));
    assert!(g.block_at(m.symbol("two")).is_some_and(|i| g.blocks[i].address_taken));
    assert_eq!(m.targets.patchable(&m.image, &g, m.symbol("one")), Err(PatchRefusal::BranchTarget));
}

#[test]
fn pointers_of_fixed_modules_are_found_without_relocations() {
    let source = [
        function("_start", "nop\n jmp *labels(,%rdi,8)\n at: nop\n inner: nop\n nop\n nop\n nop\n ret"),
        function("g", "mov $other,%eax\n ret\n nop"),
        function("h", "nop\n nop\n other: nop\n nop\n nop\n ret"),
        ".data\n .balign 8\nlabels: .quad at, inner, 0\n".to_owned(),
        ".section .note.GNU-stack,\"\",@progbits\n".to_owned(),
    ]
    .concat();
    let m = compile(&source, "S", &["-static", "-nostdlib", "-no-pie"]);
    assert!(m.image.kind().is_fixed());
    assert!(m.targets.is_branch_target(m.symbol("inner")) && m.targets.is_branch_target(m.symbol("other")));
    let g = m.graph("_start");
    assert_eq!(m.targets.patchable(&m.image, &g, m.symbol("at")), Err(PatchRefusal::BranchTarget));
    assert_eq!(g.jump_tables.len(), 1);
    assert!(!g.jump_tables[0].exact, "the program may write into it");
}
