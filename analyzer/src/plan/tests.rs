use super::*;
use crate::testing::{IDLE, LEAF, Program, WORK, branched, profile, program, sampled};
use dyni_schema::Method;

fn module(p: &Program) -> Module<'_> {
    Module { image: &p.image, functions: &p.functions, targets: &p.targets }
}

fn plan_of(p: &Program, profile: &Profile) -> Analysis {
    let analysis = analyze(profile, &[module(p)], &Options::default()).unwrap();
    assert_eq!(analysis.plan.validate(), Ok(()));
    analysis
}

#[test]
fn a_hot_loop_is_in_front_and_its_header_is_patched() {
    let p = program();
    let analysis = plan_of(&p, &sampled(&p, &[(WORK + 2, 10), (WORK + 6, 900), (LEAF, 20)]));
    let functions = &analysis.plan.modules[0].functions;
    let work = functions.iter().find(|f| f.start == WORK).unwrap();
    assert_eq!(work.blocks, [0, 4, 6, 0xa, 0x10]);
    assert_eq!(work.hot, 4, "the cold way out is cold");
    assert_eq!(work.entries, [6]);
    assert_eq!(work.weight, 910);
    assert_eq!(work.hash, function_hash(&p.image, p.functions.starting_at(LinkAddr(WORK)).unwrap()));
    assert_eq!(functions.len(), 2);
    assert_eq!(analysis.modules[0].after.hot_blocks, 5);
}

#[test]
fn branch_stacks_give_edges_and_fall_throughs() {
    let p = program();
    let (jne, head, call) = (WORK + 8, WORK + 6, WORK + 0xa);
    let seen = branched(
        &p,
        Method::Lbr,
        &[(WORK + 2, WORK + 0x10, 3), (jne, head, 90), (call, LEAF, 10)],
        &[(WORK, WORK + 2, 3), (WORK, jne, 10), (head, jne, 80), (head, call, 10)],
    );
    let evidence = Evidence::new(&seen.modules[0], Method::Lbr);
    let function = *p.functions.starting_at(LinkAddr(WORK)).unwrap();
    let (layout, _) = lay_out(&module(&p), function, &evidence, PassSet::ALL).unwrap();
    assert_eq!(layout.flow.nodes, [13, 10, 100, 10, 3]);
    let edge = |from, to| layout.flow.edges[layout.edges.iter().position(|e| (e.from, e.to) == (from, to)).unwrap()];
    assert_eq!((edge(0, 4), edge(0, 1), edge(2, 2), edge(2, 3)), (3, 10, 90, 10));
    let analysis = plan_of(&p, &seen);
    assert_eq!(analysis.plan.modules[0].functions[0].weight, 103);
}

#[test]
fn exact_counts_need_only_the_blocks_off_a_spanning_tree() {
    let p = program();
    let counted = [(WORK, WORK + 2, 1000), (WORK + 6, WORK + 8, 10_000), (WORK + 0x10, WORK + 0x12, 0)];
    let seen = branched(&p, Method::Count, &[], &counted);
    let evidence = Evidence::new(&seen.modules[0], Method::Count);
    let function = *p.functions.starting_at(LinkAddr(WORK)).unwrap();
    let (layout, _) = lay_out(&module(&p), function, &evidence, PassSet::ALL).unwrap();
    assert_eq!(layout.flow.nodes, [1000, 1000, 10_000, 1000, 0]);
    assert_eq!(layout.hot, 4);
    let analysis = plan_of(&p, &seen);
    assert_eq!(analysis.plan.function_count(), 1, "a profile of counts alone names its functions by them");
}

#[test]
fn what_is_refused_has_a_reason() {
    let p = program();
    let analysis = plan_of(&p, &sampled(&p, &[(WORK + 6, 900), (LEAF + 0xf, 5), (IDLE, 20)]));
    let refused = &analysis.refused[0];
    assert_eq!(
        (refused.start, refused.reason, refused.weight),
        (LinkAddr(IDLE), Reason::Function(GiveUp::TooSmall), 20)
    );
    assert_eq!((analysis.modules[0].outside, analysis.modules[0].planned, analysis.modules[0].weight), (5, 900, 925));
}

#[test]
fn coverage_takes_the_hottest_first() {
    let p = program();
    let profile = sampled(&p, &[(WORK, 1), (LEAF, 9_990), (IDLE, 9)]);
    let take = |ppm| {
        let options = Options { coverage_ppm: ppm, ..Options::default() };
        let analysis = analyze(&profile, &[module(&p)], &options).unwrap();
        (analysis.plan.function_count(), analysis.refused.len())
    };
    assert_eq!(take(999_000), (1, 0));
    assert_eq!(take(999_500), (1, 1));
    assert_eq!(take(1_000_000), (2, 1));
    assert_eq!(take(0), (0, 0));
}

#[test]
fn without_passes_functions_are_copied_as_they_are() {
    let p = program();
    let options = Options { passes: PassSet::NONE, ..Options::default() };
    let analysis = analyze(&sampled(&p, &[(WORK + 6, 900), (LEAF, 1000)]), &[module(&p)], &options).unwrap();
    let functions = &analysis.plan.modules[0].functions;
    assert_eq!(functions.iter().map(|f| f.start).collect::<Vec<_>>(), [WORK, LEAF]);
    assert_eq!((functions[0].blocks.len(), functions[0].hot, functions[0].entries.len()), (5, 5, 0));
    assert!(analysis.plan.passes.is_empty());
}

#[test]
fn missing_and_damaged_input_is_said() {
    let p = program();
    let mut seen = sampled(&p, &[(WORK, 1)]);
    assert!(analyze(&seen, &[], &Options::default()).unwrap_err().to_string().contains("tiny"));
    seen.modules[0].samples.count[0] = 0;
    assert!(matches!(analyze(&seen, &[module(&p)], &Options::default()), Err(Error::Profile(_))));
    let nothing = plan_of(&p, &profile(&p, Method::Clock));
    assert_eq!(nothing.plan.function_count(), 0);
}

#[test]
fn annotating_names_the_functions_that_were_hit() {
    let p = program();
    let mut seen = sampled(&p, &[(WORK + 6, 900), (LEAF + 0xf, 5), (IDLE, 20)]);
    annotate(&mut seen, &[module(&p)]);
    assert_eq!(seen.modules[0].functions.start, [WORK, IDLE]);
    assert_eq!(seen.modules[0].functions.size, [0x14, 2]);
    assert_eq!(seen.validate(), Ok(()));
}
