use super::*;
use crate::testing::{IDLE, WORK, program, sampled};

#[test]
fn the_text_reads_like_this() {
    let p = program();
    let module = Module { image: &p.image, functions: &p.functions, targets: &p.targets };
    let profile = sampled(&p, &[(WORK + 2, 10), (WORK + 6, 900), (IDLE, 7)]);
    let text = |what: &str| explain(&profile, &[module], &Options::default(), what);
    let expected = "\
work in tiny
  0x1000, 20 bytes, 910 samples
  passes infer,split,exttsp,entries,plt,tables,promote,dispatch,cdsort
  infer: 910 samples in blocks, 0 samples outside blocks, 2 unseen blocks that must have run, 0 functions not solved to the optimum
  split: 4 hot blocks, 16 bytes in front, 0 of them without evidence, 4 cold bytes
  exttsp: 0 blocks moved, 168 fall-throughs before, 168 after, 0 score gained
  entries: 1 blocks to patch, 1 loop headers, 0 indirect targets
  plt: 0 calls past the linkage table, 0 times made
  tables: 0 jumps through tables, 0 of them through tables of the copies, 0 entries, 0 times jumped
  promote: 0 call sites with known callees, 0 of them promoted, 0 calls seen, 0 of them of the usual callee
  dispatch: 0 functions with jumps through the original's tables, 0 such jumps, 0 taken branches that they save
   new   offset  bytes insns   samples        count what
     0       +0      4     2        10           56 ->+4:56 ~>+10:0 [patched]
     1       +4      2     1         0           56 ->+6:56
     2       +6      4     2       900       307256 ~>+6:307200 ->+a:56 [patched]
     3       +a      6     2         0           56 return:56
  ---- cold
     4      +10      4     2         0            0
";
    assert_eq!(text("work").unwrap(), expected);
    assert_eq!(text("0x1008"), text("work"));
    let idle =
        "idle in tiny\n  0x1030, 2 bytes, 7 samples\n  not optimised: it is shorter than an entry patch (5 bytes)\n";
    assert_eq!(text("idle").unwrap(), idle);
    assert_eq!(text("nobody"), Err(ExplainError::Unknown("nobody".into())));
}
