//! From events of live processes to tables by module and link address.
//!
//! Follows the processes of a group as the events tell: a fork has its parent's modules, a `dlopen` adds one, an `execve`
//! makes it another program or not. Nothing here reads a process: that is the `load` that it is given, so that recorded
//! and made-up events can be attributed as well.

use crate::branch::{self, Proof};
use crate::maps::{AddressMap, MappedModule};
use crate::records::{Branch, Event};
use crate::tables::{Place, Tables};
use dyni_schema::profile::MAX_STRING;
use dyni_schema::{BuildId, LinkAddr, ModuleProfile, RunAddr};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// What a process runs, when it is looked at.
#[derive(Clone, Debug)]
pub enum Image {
    /// The program of the group, with these modules.
    Modules(Vec<MappedModule>),
    /// Another program.
    Other,
    /// It can't be looked at any more.
    Gone,
}

/// Looks at a process.
pub type Load<'a> = dyn FnMut(i32) -> Image + 'a;

/// The original address of an address in dyni's own code cache of a process; `None` if it is not one that a copy stands
/// for.
pub type Resolve<'a> = dyn Fn(i32, RunAddr) -> Option<RunAddr> + 'a;

#[derive(Debug)]
struct Process {
    /// `None`: another program, whose samples do not count.
    map: Option<Arc<AddressMap>>,
    /// It has mapped something since it was looked at.
    stale: bool,
}

#[derive(Debug)]
struct Module {
    build_id: BuildId,
    name: String,
    path: String,
}

/// What was counted, apart from the tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Samples in user code of a module.
    pub samples: u64,
    /// Samples in user code of no module.
    pub outside: u64,
    /// Samples in the kernel.
    pub kernel: u64,
    /// Samples that a code cache of dyni took and that were counted at the original address.
    pub in_cache: u64,
    /// Samples that the ring buffers lost.
    pub lost: u64,
    /// Branch stack entries that were counted.
    pub branches: u64,
    /// Processes seen.
    pub processes: u32,
    /// Threads seen.
    pub threads: u32,
}

/// Everything that has been attributed so far.
pub struct Attribution<'a> {
    load: Box<Load<'a>>,
    resolve: Option<&'a Resolve<'a>>,
    /// Whether events can only come from the group and its descendants (per-thread events do; system-wide ones don't).
    only_ours: bool,
    processes: HashMap<i32, Process>,
    seen_processes: HashSet<i32>,
    seen_threads: HashSet<i32>,
    modules: Vec<Module>,
    tables: Tables,
    totals: Totals,
}

impl<'a> Attribution<'a> {
    /// Nothing attributed yet. `only_ours`: a process that no event announced is a descendant whose birth was lost, not
    /// a stranger.
    #[must_use]
    pub fn new(load: Box<Load<'a>>, resolve: Option<&'a Resolve<'a>>, only_ours: bool) -> Self {
        Self {
            load,
            resolve,
            only_ours,
            processes: HashMap::new(),
            seen_processes: HashSet::new(),
            seen_threads: HashSet::new(),
            modules: Vec::new(),
            tables: Tables::default(),
            totals: Totals::default(),
        }
    }

    /// Adds a process of the group and looks at it.
    pub fn add_process(&mut self, pid: i32, threads: &[i32]) {
        self.look(pid);
        if self.is_member(pid) {
            self.seen_threads.extend(threads);
        }
    }

    /// The counts so far.
    #[must_use]
    pub fn totals(&self) -> Totals {
        Totals { processes: self.seen_processes.len() as u32, threads: self.seen_threads.len() as u32, ..self.totals }
    }

    /// Takes in one event; events come in the order of time. `branches` is what the event's stack is a range of.
    pub fn event(&mut self, event: &Event, branches: &[Branch]) {
        match *event {
            Event::Sample { pid, tid, ip, ref stack } => {
                let Some(map) = self.map(pid) else { return };
                self.seen_threads.insert(tid);
                self.sample(pid, ip, &map);
                self.stack(pid, branches.get(stack.clone()).unwrap_or_default(), &map);
            }
            Event::Kernel => self.totals.kernel += 1,
            Event::Lost(count) => {
                self.totals.lost = self.totals.lost.saturating_add(count);
                // A missing record may have been a mapping.
                self.processes.values_mut().for_each(|p| p.stale = true);
            }
            Event::Exec { pid } if self.known(pid) => {
                // What it ran before tells nothing about what it runs now, not even if it is gone by now.
                self.processes.remove(&pid);
                self.look(pid);
            }
            Event::Mapped { pid } => {
                if let Some(process) = self.processes.get_mut(&pid) {
                    process.stale = true;
                }
            }
            Event::Fork { pid, parent, tid } => self.fork(pid, parent, tid),
            // A PID that is used again comes with a fork of its own, which replaces the entry here.
            Event::Exec { .. } | Event::Exit { .. } | Event::Other => {}
        }
    }

    /// The processes that are members as far as events told, some of which may have ended.
    pub fn members(&self) -> impl Iterator<Item = i32> + '_ {
        self.processes.iter().filter(|(_, p)| p.map.is_some()).map(|(&pid, _)| pid)
    }

    fn known(&self, pid: i32) -> bool {
        self.only_ours || self.processes.contains_key(&pid)
    }

    fn is_member(&self, pid: i32) -> bool {
        self.processes.get(&pid).is_some_and(|p| p.map.is_some())
    }

    fn fork(&mut self, pid: i32, parent: i32, tid: i32) {
        if pid != parent && self.known(parent) {
            if !self.processes.contains_key(&parent) {
                self.look(parent);
            }
            let (map, stale) = self.processes.get(&parent).map_or((None, false), |p| (p.map.clone(), p.stale));
            if map.is_some() {
                self.seen_processes.insert(pid);
            }
            self.processes.insert(pid, Process { map, stale });
        }
        if self.is_member(pid) {
            self.seen_threads.insert(tid);
        }
    }

    /// The address map of a member; looks at the process again if it has changed.
    fn map(&mut self, pid: i32) -> Option<Arc<AddressMap>> {
        match self.processes.get(&pid) {
            Some(Process { map: None, .. }) => return None,
            Some(Process { stale: false, .. }) => {}
            Some(_) => self.look(pid),
            None if self.only_ours => self.look(pid),
            None => return None,
        }
        self.processes.get(&pid)?.map.clone()
    }

    fn look(&mut self, pid: i32) {
        let map = match (self.load)(pid) {
            Image::Modules(modules) => {
                let mut map = AddressMap::default();
                for module in &modules {
                    let index = self.module(module);
                    module.text.iter().for_each(|t| map.insert(t.clone(), module.bias, index));
                }
                Some(Arc::new(map))
            }
            Image::Other => None,
            // Keep what was known of it: its last samples are still to come.
            Image::Gone => self.processes.get(&pid).and_then(|p| p.map.clone()),
        };
        if map.is_some() {
            self.seen_processes.insert(pid);
        }
        self.processes.insert(pid, Process { map, stale: false });
    }

    fn module(&mut self, module: &MappedModule) -> usize {
        self.modules.iter().position(|m| m.build_id == module.build_id).unwrap_or_else(|| {
            let (name, path) = (bounded(&module.name), bounded(&module.path.to_string_lossy()));
            self.modules.push(Module { build_id: module.build_id.clone(), name, path });
            self.modules.len() - 1
        })
    }

    /// Where an address is, and whether it was in a code cache.
    fn place(&self, pid: i32, addr: RunAddr, map: &AddressMap) -> Option<(Place, bool)> {
        let known = |(module, link): (usize, LinkAddr)| (module as u32, link);
        if let Some(found) = map.lookup(addr) {
            return Some((known(found), false));
        }
        let original = self.resolve.and_then(|resolve| resolve(pid, addr))?;
        map.lookup(original).map(|found| (known(found), true))
    }

    fn sample(&mut self, pid: i32, ip: RunAddr, map: &AddressMap) {
        match self.place(pid, ip, map) {
            Some((place, in_cache)) => {
                self.tables.sample(place);
                self.totals.samples += 1;
                self.totals.in_cache += u64::from(in_cache);
            }
            None => self.totals.outside += 1,
        }
    }

    fn stack(&mut self, pid: i32, stack: &[Branch], map: &AddressMap) {
        let mut proofs = Vec::with_capacity(2 * stack.len());
        branch::proofs(stack, |proof| proofs.push(proof));
        for proof in proofs {
            let (a, b) = proof.ends();
            let (Some((a, a_cached)), Some((b, b_cached))) = (self.place(pid, a, map), self.place(pid, b, map)) else {
                continue;
            };
            // What is straight in a cache is not so in the original.
            if matches!(proof, Proof::Straight { .. }) && (a_cached || b_cached) {
                continue;
            }
            if self.tables.proof(proof, a, b) {
                self.totals.branches += 1;
            }
        }
    }

    /// The tables, by module, sorted by build-id; modules in which nothing was seen are left out.
    #[must_use]
    pub fn into_modules(self) -> Vec<ModuleProfile> {
        let named =
            |m: Module| ModuleProfile { build_id: m.build_id, name: m.name, path: m.path, ..Default::default() };
        self.tables.into_modules(self.modules.into_iter().map(named).collect())
    }
}

/// A string that a profile may hold.
pub fn bounded(text: &str) -> String {
    let mut end = text.len().min(MAX_STRING);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::FileId;
    use dyni_schema::{Branches, Ranges, Samples};

    fn module(id: u8, bias: u64) -> MappedModule {
        let text = RunAddr(bias + 0x1000)..RunAddr(bias + 0x2000);
        MappedModule {
            build_id: BuildId(vec![id]),
            name: format!("m{id}"),
            path: format!("/m{id}").into(),
            deleted: false,
            file: None,
            file_id: FileId { dev: (0, 0), inode: u64::from(id) },
            bias,
            span: text.clone(),
            text: vec![text],
        }
    }

    fn sample(pid: i32, ip: u64) -> Event {
        Event::Sample { pid, tid: pid, ip: RunAddr(ip), stack: 0..0 }
    }

    fn taken(from: u64, to: u64) -> Branch {
        Branch { from: RunAddr(from), to: RunAddr(to), mispredicted: from % 2 == 1 }
    }

    #[test]
    fn samples_of_forks_land_in_the_same_tables_and_strangers_in_none() {
        let load = |pid| match pid {
            1 => Image::Modules(vec![module(9, 0x10_0000), module(3, 0x20_0000)]),
            _ => Image::Gone,
        };
        let mut a = Attribution::new(Box::new(load), None, false);
        a.add_process(1, &[1, 11]);
        let fork = Event::Fork { pid: 2, parent: 1, tid: 2 };
        for event in [sample(1, 0x10_1000), fork, sample(2, 0x10_1000), sample(2, 0x20_1fff), sample(2, 5)] {
            a.event(&event, &[]);
        }
        a.event(&sample(77, 0x10_1000), &[]);
        let totals = a.totals();
        assert_eq!((totals.samples, totals.outside, totals.processes, totals.threads), (3, 1, 2, 3));
        let modules = a.into_modules();
        assert_eq!(modules.iter().map(|m| m.name.as_str()).collect::<Vec<_>>(), ["m3", "m9"]);
        assert_eq!(modules[1].samples, Samples { addr: vec![0x1000], count: vec![2] });
    }

    #[test]
    fn an_exec_of_another_program_ends_membership() {
        let mut execs = 0;
        let load = |pid| match pid {
            1 => Image::Modules(vec![module(9, 0)]),
            _ => {
                execs += 1;
                Image::Other
            }
        };
        let mut a = Attribution::new(Box::new(load), None, true);
        a.add_process(1, &[1]);
        a.event(&Event::Fork { pid: 2, parent: 1, tid: 2 }, &[]);
        a.event(&sample(2, 0x1000), &[]);
        a.event(&Event::Exec { pid: 2 }, &[]);
        a.event(&sample(2, 0x1000), &[]);
        assert_eq!(a.totals().samples, 1);
        drop(a);
        assert_eq!(execs, 1);
    }

    #[test]
    fn a_mapping_is_looked_at_once_and_only_when_it_matters() {
        let looks = std::cell::Cell::new(0);
        let load = |_| {
            looks.set(looks.get() + 1);
            Image::Modules(if looks.get() > 1 { vec![module(9, 0), module(3, 0x8000)] } else { vec![module(9, 0)] })
        };
        let mut a = Attribution::new(Box::new(load), None, true);
        a.add_process(1, &[1]);
        a.event(&sample(1, 0x9000), &[]);
        a.event(&Event::Mapped { pid: 1 }, &[]);
        a.event(&Event::Mapped { pid: 1 }, &[]);
        assert_eq!(looks.get(), 1);
        a.event(&sample(1, 0x9000), &[]);
        a.event(&sample(1, 0x9000), &[]);
        assert_eq!((a.totals().samples, a.totals().outside, looks.get()), (2, 1, 2));
    }

    #[test]
    fn a_code_cache_is_counted_at_the_original() {
        let resolve = |pid, addr: RunAddr| (pid == 1 && addr.0 >= 0xf000).then(|| RunAddr(addr.0 - 0xf000 + 0x1000));
        let mut a = Attribution::new(Box::new(|_| Image::Modules(vec![module(9, 0)])), Some(&resolve), true);
        a.add_process(1, &[1]);
        a.event(&sample(1, 0xf010), &[]);
        a.event(&sample(1, 0x1f000), &[]);
        let stack = [taken(0xf021, 0xf010), taken(0x1f, 0xf020), taken(0x1021, 0x1010), taken(0x1021, 0x1010)];
        a.event(&Event::Sample { pid: 1, tid: 1, ip: RunAddr(0x1010), stack: 0..4 }, &stack);
        assert_eq!((a.totals().samples, a.totals().in_cache, a.totals().outside), (2, 1, 1));
        let modules = a.into_modules();
        assert_eq!(modules[0].samples, Samples { addr: vec![0x1010], count: vec![2] });
        let expected = Branches { from: vec![0x1021], to: vec![0x1010], count: vec![3], mispredicted: vec![3] };
        assert_eq!(modules[0].branches, expected);
        assert_eq!(modules[0].ranges, Ranges { start: vec![0x1010], end: vec![0x1021], count: vec![1] });
    }
}
