//! Chains of nodes that are merged pair by pair: the bookkeeping that ext-TSP (blocks) and cdsort (functions) share.
//!
//! Each node starts as a chain of its own. Two chains that have jumps between them share one [`Link`], which holds those
//! jumps; jumps inside a chain are its [`Chains::own`] ones. A link's stamp changes whenever either chain does, so that a
//! priority queue can hold stale entries and drop them when they surface.

/// The jumps between two chains.
#[derive(Clone, Debug, Default)]
pub(crate) struct Link {
    /// One chain.
    pub a: u32,
    /// The other.
    pub b: u32,
    /// Indices of the jumps between them, in either direction.
    pub jumps: Vec<u32>,
    /// Changes when either chain changes or the link is gone.
    pub stamp: u32,
}

/// All chains of one layout problem.
pub(crate) struct Chains {
    /// The nodes of each chain in order; empty for a chain that was merged into another.
    pub nodes: Vec<Vec<u32>>,
    /// The chain that each node is in.
    pub of: Vec<u32>,
    /// Each node's place in its chain.
    pub position: Vec<u32>,
    /// Each node's distance in bytes from the start of its chain.
    pub offset: Vec<i64>,
    /// Bytes in each chain.
    pub size: Vec<i64>,
    /// Sum of the counts of each chain's nodes.
    pub count: Vec<u128>,
    /// The jumps with both ends in the chain.
    pub own: Vec<Vec<u32>>,
    /// For each chain the others that it has jumps to or from, and the link that holds them.
    pub links: Vec<Vec<(u32, u32)>>,
    /// Every link that there ever was.
    pub link: Vec<Link>,
    node_size: Vec<i64>,
    /// By chain, the link of the chain being merged to it; all `NONE` between merges.
    mark: Vec<u32>,
}

const NONE: u32 = u32::MAX;

impl Chains {
    /// One chain per node, of that size in bytes and that count; `jumps` are pairs of nodes.
    pub fn new(nodes: impl Iterator<Item = (u64, u64)>, jumps: impl Iterator<Item = (u32, u32)>) -> Self {
        let (node_size, count): (Vec<i64>, Vec<u128>) = nodes.map(|(s, c)| (s as i64, u128::from(c))).unzip();
        let n = node_size.len();
        let mut chains = Self {
            nodes: (0..n as u32).map(|i| vec![i]).collect(),
            of: (0..n as u32).collect(),
            position: vec![0; n],
            offset: vec![0; n],
            size: node_size.clone(),
            count,
            own: vec![Vec::new(); n],
            links: vec![Vec::new(); n],
            link: Vec::new(),
            node_size,
            mark: vec![NONE; n],
        };
        let mut pairs: Vec<(u32, u32, u32)> =
            jumps.enumerate().map(|(i, (from, to))| (from.min(to), from.max(to), i as u32)).collect();
        pairs.sort_unstable();
        for (a, b, jump) in pairs {
            if a == b {
                chains.own[a as usize].push(jump);
                continue;
            }
            match chains.link.last_mut().filter(|l| (l.a, l.b) == (a, b)) {
                Some(link) => link.jumps.push(jump),
                None => {
                    let l = chains.link.len() as u32;
                    chains.link.push(Link { a, b, jumps: vec![jump], stamp: 0 });
                    chains.links[a as usize].push((b, l));
                    chains.links[b as usize].push((a, l));
                }
            }
        }
        chains
    }

    /// Makes one chain, `into`, of two, its nodes lying in this order.
    pub fn merge(&mut self, into: u32, from: u32, order: Vec<u32>) {
        let (i, f) = (into as usize, from as usize);
        debug_assert_eq!(order.len(), self.nodes[i].len() + self.nodes[f].len());
        let mut at = 0;
        for (place, &node) in order.iter().enumerate() {
            self.of[node as usize] = into;
            self.position[node as usize] = place as u32;
            self.offset[node as usize] = at;
            at += self.node_size[node as usize];
        }
        self.nodes[i] = order;
        self.nodes[f] = Vec::new();
        self.size[i] = at;
        self.count[i] += self.count[f];
        let moved = std::mem::take(&mut self.own[f]);
        self.own[i].extend(moved);
        self.merge_links(into, from);
    }

    fn merge_links(&mut self, into: u32, from: u32) {
        let i = into as usize;
        let mut kept = std::mem::take(&mut self.links[i]);
        kept.retain(|&(other, l)| {
            if other == from {
                let link = &mut self.link[l as usize];
                link.stamp += 1;
                self.own[i].append(&mut link.jumps);
                return false;
            }
            self.mark[other as usize] = l;
            true
        });
        for (other, l) in std::mem::take(&mut self.links[from as usize]) {
            if other == into {
                continue;
            }
            let same = self.mark[other as usize];
            let back = &mut self.links[other as usize];
            let entry = back.iter().position(|&(c, _)| c == from).expect("links go both ways");
            if same == NONE {
                back[entry].0 = into;
                let link = &mut self.link[l as usize];
                if link.a == from {
                    link.a = into;
                } else {
                    link.b = into;
                }
                kept.push((other, l));
            } else {
                back.swap_remove(entry);
                let jumps = std::mem::take(&mut self.link[l as usize].jumps);
                self.link[l as usize].stamp += 1;
                self.link[same as usize].jumps.extend(jumps);
            }
        }
        for &(other, l) in &kept {
            self.mark[other as usize] = NONE;
            self.link[l as usize].stamp += 1;
        }
        self.links[i] = kept;
    }

    /// The chains that are left, densest first (count per byte, compared exactly), then by first node; chains for which
    /// `first` holds before all others.
    pub fn by_density(&self, first: impl Fn(&[u32]) -> bool) -> Vec<u32> {
        let mut left: Vec<u32> = (0..self.nodes.len() as u32).filter(|&c| !self.nodes[c as usize].is_empty()).collect();
        left.sort_by(|&l, &r| {
            let (ln, rn) = (&self.nodes[l as usize], &self.nodes[r as usize]);
            let density = |c: u32, d: u32| self.count[c as usize].saturating_mul(self.size[d as usize].max(1) as u128);
            first(rn).cmp(&first(ln)).then_with(|| density(r, l).cmp(&density(l, r))).then_with(|| ln[0].cmp(&rn[0]))
        });
        left
    }
}
