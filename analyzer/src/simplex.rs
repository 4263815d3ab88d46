//! Minimum-cost circulation by the primal network simplex method.
//!
//! Why this method: a circulation of zero flow is always feasible, so there is no first phase; every pivot keeps flow
//! conservation and never makes the cost worse, so stopping at a limit still gives a usable answer; and it is all
//! integer arithmetic, so the answer is the same everywhere. Sources: Ahuja, Magnanti, Orlin, "Network Flows" (1993),
//! chapter 11 (strongly feasible trees, block search); Kovács, "Minimum-cost flow algorithms: an experimental
//! evaluation" (2015).
//!
//! Invariants: tree arcs have reduced cost 0; an arc outside the tree carries nothing or is full; every node can send
//! some flow to the root along tree arcs (strong feasibility, which is what rules out endless degenerate pivots).

/// A capacity that is never reached.
pub const UNBOUNDED: i64 = i64::MAX / 8;
const NONE: u32 = u32::MAX;

/// One arc of a [`Network`].
#[derive(Clone, Copy, Debug)]
struct Arc {
    from: u32,
    to: u32,
    capacity: i64,
    /// Cost per unit; a negative one is a reward, and then the capacity must be bounded.
    cost: i64,
    flow: i64,
    /// 1: carries nothing; -1: full; 0: in the tree. The sign that a reduced cost must have is the opposite one.
    state: i64,
}

/// A directed graph whose arcs have a capacity and a cost.
#[derive(Clone, Debug, Default)]
pub struct Network {
    nodes: u32,
    arcs: Vec<Arc>,
}

/// What [`Network::solve`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// No circulation is cheaper.
    Optimal,
    /// The pivot limit was reached: flow is conserved, but a cheaper circulation may exist.
    Feasible,
}

/// The spanning tree, rooted at the artificial node `nodes`.
struct Tree {
    parent: Vec<u32>,
    /// The arc that joins a node to its parent.
    arc: Vec<u32>,
    depth: Vec<u32>,
    potential: Vec<i64>,
    first_child: Vec<u32>,
    next: Vec<u32>,
    previous: Vec<u32>,
}

impl Network {
    /// A network of `nodes` nodes without arcs.
    #[must_use]
    pub fn new(nodes: usize) -> Self {
        Self { nodes: u32::try_from(nodes).expect("a network has fewer than 2^32 nodes"), arcs: Vec::new() }
    }

    /// Adds an arc and returns its number. `cost` is per unit of flow and at most 2^32 in size, `capacity` at most
    /// [`UNBOUNDED`], and bounded if the cost is negative.
    pub fn arc(&mut self, from: u32, to: u32, capacity: i64, cost: i64) -> usize {
        debug_assert!(from < self.nodes && to < self.nodes && (0..=UNBOUNDED).contains(&capacity));
        debug_assert!(cost >= 0 || capacity < UNBOUNDED);
        self.arcs.push(Arc { from, to, capacity, cost, flow: 0, state: 1 });
        self.arcs.len() - 1
    }

    /// The number of arcs that were added.
    #[must_use]
    pub fn arc_count(&self) -> usize {
        self.arcs.len()
    }

    /// The flow on the arc with this number, after [`Network::solve`].
    #[must_use]
    pub fn flow(&self, arc: usize) -> i64 {
        self.arcs[arc].flow
    }

    /// Finds a circulation of least cost in at most `max_pivots` steps.
    pub fn solve(&mut self, max_pivots: usize) -> Outcome {
        let real = self.arcs.len();
        // Arcs from every node to the root and none back: they can never carry anything, and they make the first tree.
        for node in 0..self.nodes {
            self.arcs.push(Arc { from: node, to: self.nodes, capacity: UNBOUNDED, cost: 0, flow: 0, state: 0 });
        }
        let mut tree = Tree::star(self.nodes, real);
        let block = (real.isqrt() * 2).max(16);
        let mut at = 0;
        let mut outcome = Outcome::Feasible;
        for _ in 0..max_pivots {
            let Some(entering) = self.entering(&tree, real, block, &mut at) else {
                outcome = Outcome::Optimal;
                break;
            };
            self.pivot(&mut tree, entering);
        }
        self.arcs.truncate(real);
        outcome
    }

    /// The worst offender of the next block of arcs that has one (block search), or nothing if the tree is optimal.
    fn entering(&self, tree: &Tree, real: usize, block: usize, at: &mut usize) -> Option<usize> {
        let (mut best, mut worst, mut in_block) = (None, 0, 0);
        for _ in 0..real {
            let i = *at;
            *at = if i + 1 == real { 0 } else { i + 1 };
            let a = &self.arcs[i];
            let reduced = a.state * (a.cost + tree.potential[a.from as usize] - tree.potential[a.to as usize]);
            if reduced < worst {
                (worst, best) = (reduced, Some(i));
            }
            in_block += 1;
            if in_block == block {
                if best.is_some() {
                    return best;
                }
                in_block = 0;
            }
        }
        best
    }

    /// What still fits on the tree arc above `node`, in the direction of the root (`up`) or away from it.
    fn residual(&self, tree: &Tree, node: u32, up: bool) -> i64 {
        let a = &self.arcs[tree.arc[node as usize] as usize];
        if (a.from == node) == up { a.capacity - a.flow } else { a.flow }
    }

    /// Adds `amount` to the tree arc above `node`, in the direction of the root (`up`) or away from it.
    fn push(&mut self, tree: &Tree, node: u32, up: bool, amount: i64) {
        let a = &mut self.arcs[tree.arc[node as usize] as usize];
        a.flow += if (a.from == node) == up { amount } else { -amount };
    }

    /// Sends as much as fits around the cycle that `entering` closes, and exchanges it for the arc that stopped it.
    fn pivot(&mut self, tree: &mut Tree, entering: usize) {
        let Arc { from, to, capacity, state, .. } = self.arcs[entering];
        // Flow goes tail -> head over the entering arc, then head -> root -> tail over the tree.
        let (tail, head) = if state == 1 { (from, to) } else { (to, from) };
        let join = tree.join(tail, head);
        // The last arc that blocks, seen from the join in the direction of the flow, leaves: that keeps the tree
        // strongly feasible. `None` means that the entering arc itself blocks.
        let mut amount = capacity;
        let mut leaving: Option<(u32, bool)> = None;
        let mut u = tail;
        while u != join {
            let fits = self.residual(tree, u, false);
            if fits < amount {
                (amount, leaving) = (fits, Some((u, true)));
            }
            u = tree.parent[u as usize];
        }
        u = head;
        while u != join {
            let fits = self.residual(tree, u, true);
            if fits <= amount {
                (amount, leaving) = (fits, Some((u, false)));
            }
            u = tree.parent[u as usize];
        }
        if amount > 0 {
            self.arcs[entering].flow += state * amount;
            u = tail;
            while u != join {
                self.push(tree, u, false, amount);
                u = tree.parent[u as usize];
            }
            u = head;
            while u != join {
                self.push(tree, u, true, amount);
                u = tree.parent[u as usize];
            }
        }
        let Some((cut, on_tail_side)) = leaving else {
            self.arcs[entering].state = -state;
            return;
        };
        let out = &mut self.arcs[tree.arc[cut as usize] as usize];
        out.state = if out.flow == 0 { 1 } else { -1 };
        self.arcs[entering].state = 0;
        // The part below the cut hangs on the entering arc from now on.
        let (inner, outer) = if on_tail_side { (tail, head) } else { (head, tail) };
        let a = &self.arcs[entering];
        let (pf, pt) = (tree.potential[a.from as usize], tree.potential[a.to as usize]);
        let reduced = a.cost + pf - pt;
        let shift = if a.from == inner { -reduced } else { reduced };
        tree.hang(inner, outer, entering as u32, cut, shift);
    }
}

impl Tree {
    /// Every node a child of the root by its artificial arc.
    fn star(nodes: u32, first_arc: usize) -> Self {
        let n = nodes as usize;
        let mut tree = Self {
            parent: vec![nodes; n + 1],
            arc: (0..=n).map(|i| (first_arc + i) as u32).collect(),
            depth: vec![1; n + 1],
            potential: vec![0; n + 1],
            first_child: vec![NONE; n + 1],
            next: vec![NONE; n + 1],
            previous: vec![NONE; n + 1],
        };
        tree.depth[n] = 0;
        tree.parent[n] = NONE;
        for node in (0..nodes).rev() {
            tree.link(node, nodes);
        }
        tree
    }

    /// The lowest common ancestor.
    fn join(&self, mut a: u32, mut b: u32) -> u32 {
        while a != b {
            if self.depth[a as usize] >= self.depth[b as usize] {
                a = self.parent[a as usize];
            } else {
                b = self.parent[b as usize];
            }
        }
        a
    }

    fn link(&mut self, node: u32, parent: u32) {
        let first = self.first_child[parent as usize];
        self.parent[node as usize] = parent;
        self.next[node as usize] = first;
        self.previous[node as usize] = NONE;
        if first != NONE {
            self.previous[first as usize] = node;
        }
        self.first_child[parent as usize] = node;
    }

    fn unlink(&mut self, node: u32) {
        let (previous, next) = (self.previous[node as usize], self.next[node as usize]);
        if previous == NONE {
            self.first_child[self.parent[node as usize] as usize] = next;
        } else {
            self.next[previous as usize] = next;
        }
        if next != NONE {
            self.previous[next as usize] = previous;
        }
    }

    /// Cuts the subtree of `cut` off, makes `inner` (a node of it) its root, hangs that below `outer` by `arc`, and
    /// moves the potentials of the subtree by `shift`.
    fn hang(&mut self, inner: u32, outer: u32, arc: u32, cut: u32, shift: i64) {
        let (mut node, mut parent, mut by) = (inner, outer, arc);
        loop {
            let (old_parent, old_arc) = (self.parent[node as usize], self.arc[node as usize]);
            self.unlink(node);
            self.link(node, parent);
            self.arc[node as usize] = by;
            if node == cut {
                break;
            }
            (parent, by, node) = (node, old_arc, old_parent);
        }
        // Walk the subtree without a stack: down to the first child, else to the next sibling of the nearest ancestor.
        let mut u = inner;
        loop {
            self.potential[u as usize] += shift;
            self.depth[u as usize] = self.depth[self.parent[u as usize] as usize] + 1;
            if self.first_child[u as usize] != NONE {
                u = self.first_child[u as usize];
                continue;
            }
            while u != inner && self.next[u as usize] == NONE {
                u = self.parent[u as usize];
            }
            if u == inner {
                return;
            }
            u = self.next[u as usize];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_reward_is_taken_as_far_as_it_pays() {
        let mut net = Network::new(3);
        let reward = net.arc(0, 1, 10, -5);
        let cheap = net.arc(1, 2, 4, 1);
        let dear = net.arc(1, 2, UNBOUNDED, 3);
        let too_dear = net.arc(1, 0, UNBOUNDED, 9);
        let back = net.arc(2, 0, UNBOUNDED, 1);
        assert_eq!(net.solve(1000), Outcome::Optimal);
        let flows: Vec<_> = [reward, cheap, dear, too_dear, back].map(|a| net.flow(a)).into();
        assert_eq!(flows, [10, 4, 6, 0, 10]);
    }

    /// No negative cycle in the residual graph: the textbook certificate of optimality, by Bellman and Ford.
    fn is_optimal(net: &Network) -> bool {
        let n = net.nodes as usize;
        let mut distance = vec![0i64; n];
        for _ in 0..=n {
            let mut changed = false;
            for a in &net.arcs {
                let mut relax = |u: u32, v: u32, cost: i64| {
                    if distance[u as usize] + cost < distance[v as usize] {
                        distance[v as usize] = distance[u as usize] + cost;
                        changed = true;
                    }
                };
                if a.flow < a.capacity {
                    relax(a.from, a.to, a.cost);
                }
                if a.flow > 0 {
                    relax(a.to, a.from, -a.cost);
                }
            }
            if !changed {
                return true;
            }
        }
        false
    }

    proptest! {
        #[test]
        fn conserves_flow_and_is_optimal(
            n in 1u32..12,
            arcs in prop::collection::vec((0u32..12, 0u32..12, 0i64..20, -20i64..20), 0..60),
        ) {
            let mut net = Network::new(n as usize);
            for (from, to, capacity, cost) in arcs {
                net.arc(from % n, to % n, capacity, cost);
            }
            prop_assert_eq!(net.solve(100_000), Outcome::Optimal);
            let mut balance = vec![0; n as usize];
            for a in &net.arcs {
                prop_assert!(a.flow >= 0 && a.flow <= a.capacity);
                balance[a.from as usize] -= a.flow;
                balance[a.to as usize] += a.flow;
            }
            prop_assert!(balance.iter().all(|&b| b == 0));
            prop_assert!(is_optimal(&net));
        }
    }
}
