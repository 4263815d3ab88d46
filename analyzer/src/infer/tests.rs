use super::*;
use proptest::prelude::*;

/// Blocks with (weight, strength), the first the entry, those without successors exits.
fn graph(blocks: &[(u64, u32)], edges: &[(u32, u32)]) -> FlowGraph {
    let mut g = FlowGraph {
        nodes: blocks.iter().map(|&(w, s)| FlowNode::inner(Some(w), s)).collect(),
        edges: edges
            .iter()
            .map(|&(from, to)| FlowEdge { from, to, weight: None, fall_through: from + 1 == to })
            .collect(),
        doubt: 0,
    };
    g.nodes[0].enters = true;
    for b in 0..blocks.len() {
        g.nodes[b].leaves = edges.iter().all(|e| e.0 as usize != b);
    }
    g
}

fn assert_conserved(g: &FlowGraph, f: &Flow) {
    let (mut into, mut out) = (f.entered.clone(), f.left.clone());
    for (e, &count) in g.edges.iter().zip(&f.edges) {
        into[e.to as usize] += count;
        out[e.from as usize] += count;
    }
    assert_eq!(f.nodes, into, "what goes into the blocks");
    assert_eq!(f.nodes, out, "what comes out of the blocks");
}

#[test]
fn a_missing_sample_on_the_only_path_is_filled_in() {
    let g = graph(&[(100, 5), (0, 2), (100, 5)], &[(0, 1), (1, 2)]);
    let f = infer(&g);
    assert_conserved(&g, &f);
    assert_eq!(f.nodes, [100, 100, 100]);
    assert_eq!(f.quality, Quality::Optimal);
}

#[test]
fn a_diamond_follows_the_arm_that_was_sampled() {
    let g = graph(&[(100, 4), (0, 4), (90, 4), (100, 4)], &[(0, 1), (0, 2), (1, 3), (2, 3)]);
    let f = infer(&g);
    assert_conserved(&g, &f);
    assert_eq!(f.nodes, [100, 0, 100, 100]);
}

#[test]
fn between_two_arms_without_samples_the_shorter_one_is_likelier() {
    let g = graph(&[(100, 4), (0, 40), (0, 2), (100, 4)], &[(0, 1), (0, 2), (1, 3), (2, 3)]);
    assert_eq!(infer(&g).nodes, [100, 0, 100, 100]);
}

#[test]
fn a_hot_loop_that_nobody_was_seen_entering_is_joined_to_the_entry() {
    let g = graph(&[(0, 9), (0, 9), (1000, 9), (0, 9)], &[(0, 1), (1, 2), (2, 2), (2, 3)]);
    for (doubt, entered) in [(0, 1), (54, 2), (1_000_000, 1000)] {
        let g = FlowGraph { doubt, ..g.clone() };
        let f = infer(&g);
        assert_conserved(&g, &f);
        assert_eq!(f.entered[0], entered);
        assert_eq!((f.nodes[0], f.nodes[1], f.nodes[3]), (entered, entered, entered));
        assert!(f.nodes[2] >= 1000);
    }
}

#[test]
fn an_endless_loop_needs_no_exit() {
    let g = graph(&[(1, 3), (500, 3), (480, 3)], &[(0, 1), (1, 2), (2, 1)]);
    let f = infer(&g);
    assert_conserved(&g, &f);
    assert!(f.nodes[1] >= 480 && f.nodes[2] >= 480, "{f:?}");
    assert!(f.nodes[0] > 0);
}

#[test]
fn known_edges_decide_and_the_tree_edges_follow() {
    // As counters off a spanning tree would give it: 0->2 and the entry are known, the rest follows.
    let mut g = graph(&[(0, 1), (0, 1), (0, 1), (0, 1)], &[(0, 1), (0, 2), (1, 3), (2, 3)]);
    g.nodes.iter_mut().for_each(|n| n.weight = None);
    g.nodes[0].entered = Some(1000);
    g.edges[1].weight = Some(30);
    let f = infer(&g);
    assert_conserved(&g, &f);
    assert_eq!(f.edges, [970, 30, 970, 30]);
}

#[test]
fn beyond_the_limit_shares_are_in_proportion() {
    let g = graph(&[(100, 4), (25, 4), (75, 4), (100, 4)], &[(0, 1), (0, 2), (1, 3), (2, 3)]);
    let f = infer_within(&g, 3);
    assert_eq!(f.quality, Quality::Heuristic);
    assert_eq!(f.edges, [25, 75, 25, 75]);
}

#[test]
fn without_evidence_all_is_zero() {
    let g = graph(&[(0, 1), (0, 1)], &[(0, 1)]);
    assert_eq!(infer(&g).nodes, [0, 0]);
    assert!(infer(&FlowGraph::default()).nodes.is_empty());
}

/// A large interpreter-like graph: a dispatch block that jumps to hundreds of handlers, each a small diamond, many of
/// which jump on to any handler.
fn interpreter(handlers: u32, dispatchers: u32) -> FlowGraph {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut random = move |n: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    };
    let n = 1 + handlers * 10;
    let mut blocks = vec![(0u64, 0u32); n as usize];
    let mut edges = Vec::new();
    for b in &mut blocks {
        b.1 = 1 + random(20) as u32;
        b.0 = if random(4) == 0 { random(100_000) } else { 0 };
    }
    for h in 0..handlers {
        let base = 1 + h * 10;
        edges.push((0, base));
        for i in 0..9 {
            edges.push((base + i, base + i + 1));
            if i % 3 == 0 {
                edges.push((base + i, base + i + 2));
            }
        }
        if h < dispatchers {
            edges.extend((0..handlers).map(|t| (base + 9, 1 + t * 10)));
        } else {
            edges.push((base + 9, 0));
        }
    }
    edges.sort_unstable();
    edges.dedup();
    graph(&blocks, &edges)
}

#[test]
fn a_large_interpreter_is_solved() {
    let g = interpreter(600, 100);
    let start = std::time::Instant::now();
    let f = infer(&g);
    println!("{} blocks, {} edges: {:?}, {:?}", g.nodes.len(), g.edges.len(), start.elapsed(), f.quality);
    assert_conserved(&g, &f);
    assert_eq!(f, infer(&g));
}

proptest! {
    #[test]
    fn flow_is_conserved_on_any_graph(
        blocks in prop::collection::vec((prop_oneof![Just(None), (0u64..2000).prop_map(Some)], 0u32..80, 0u8..8), 1..24),
        edges in prop::collection::vec((0u32..24, 0u32..24, prop_oneof![3 => Just(None), 1 => (0u64..500).prop_map(Some)]), 0..70),
    ) {
        let n = blocks.len() as u32;
        let g = FlowGraph {
            nodes: blocks.iter().map(|&(weight, strength, kind)| FlowNode {
                weight, strength, enters: kind == 0, leaves: kind == 1, entered: (kind == 0).then_some(u64::from(strength)),
            }).collect(),
            edges: edges.iter().map(|&(f, t, weight)| FlowEdge { from: f % n, to: t % n, weight, fall_through: f + 1 == t })
                .collect(),
            doubt: 100,
        };
        let f = infer(&g);
        prop_assert_eq!(f.quality, Quality::Optimal);
        assert_conserved(&g, &f);
        prop_assert!(f.nodes.iter().zip(&g.nodes).all(|(_, n)| n.weight.is_none_or(|w| w <= MAX_WEIGHT)));
    }
}
