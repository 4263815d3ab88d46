//! Which functions may be on the stack while an exception is thrown.
//!
//! The unwinder finds a frame by its return address. A copy that has not been registered with it ends the search, and the
//! program with it. Until copies are registered, a function may only be copied if nothing that it calls can throw.

use crate::cfg::{self, Terminator};
use crate::functions::{Function, Functions};
use crate::image::Image;
use crate::targets::TargetIndex;
use dyni_schema::LinkAddr;
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, OpKind};
use rayon::prelude::*;

/// What the answer depends on besides the module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The copies' unwind data are registered with the process's unwinder: no function is refused on its account.
    pub unwind_registered: bool,
    /// Other modules of the process throw, so that an exception may pass through this one even if it is plain C: a
    /// function of a C library that calls back (`qsort`).
    pub others_throw: bool,
}

/// A set of functions, by their index in [`Functions::all`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FunctionSet(Vec<u64>);

impl FunctionSet {
    /// Whether the function with this index is in the set.
    #[must_use]
    pub fn has(&self, index: usize) -> bool {
        self.0.get(index / 64).is_some_and(|w| w >> (index % 64) & 1 == 1)
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.iter().map(|w| w.count_ones() as usize).sum()
    }

    fn insert(&mut self, index: usize) -> bool {
        let word = &mut self.0[index / 64];
        let new = *word >> (index % 64) & 1 == 0;
        *word |= 1 << (index % 64);
        new
    }
}

/// Imported functions that never throw and call nothing that could: plain C of libc, libm and the C++ runtime. Functions
/// that call back (`qsort`, `bsearch`, `pthread_once`) and those that can be cancelled (`read`, `poll`, …: glibc cancels a
/// thread by throwing) are not here.
pub const NOTHROW: &[&str] = &[
    "__assert_fail",
    "__ctype_b_loc",
    "__ctype_tolower_loc",
    "__ctype_toupper_loc",
    "__cxa_atexit",
    "__cxa_begin_catch",
    "__cxa_allocate_exception",
    "__cxa_free_exception",
    "__cxa_get_globals",
    "__cxa_guard_abort",
    "__cxa_guard_acquire",
    "__cxa_guard_release",
    "__cxa_pure_virtual",
    "__errno_location",
    "__memcpy_chk",
    "__memmove_chk",
    "__memset_chk",
    "__snprintf_chk",
    "__sprintf_chk",
    "__stack_chk_fail",
    "__strcat_chk",
    "__strcpy_chk",
    "__strncpy_chk",
    "__tls_get_addr",
    "__vsnprintf_chk",
    "_ZSt9terminatev",
    "_ZdaPv",
    "_ZdaPvm",
    "_ZdlPv",
    "_ZdlPvm",
    "_ZdlPvSt11align_val_t",
    "_ZdlPvmSt11align_val_t",
    "_ZnamRKSt9nothrow_t",
    "_ZnwmRKSt9nothrow_t",
    "_exit",
    "_setjmp",
    "__sigsetjmp",
    "abort",
    "abs",
    "aligned_alloc",
    "atan",
    "atan2",
    "atof",
    "atoi",
    "atol",
    "bcmp",
    "calloc",
    "ceil",
    "clock_gettime",
    "cos",
    "exp",
    "fabs",
    "floor",
    "fmod",
    "free",
    "getenv",
    "getpid",
    "gettimeofday",
    "gmtime_r",
    "isalpha",
    "isdigit",
    "isspace",
    "localtime_r",
    "log",
    "log10",
    "log2",
    "longjmp",
    "_longjmp",
    "siglongjmp",
    "lrand48",
    "malloc",
    "malloc_usable_size",
    "memchr",
    "memcmp",
    "memcpy",
    "memmem",
    "memmove",
    "mempcpy",
    "memrchr",
    "memset",
    "mktime",
    "my_thread_yield",
    "posix_memalign",
    "pow",
    "pthread_cond_broadcast",
    "pthread_cond_destroy",
    "pthread_cond_init",
    "pthread_cond_signal",
    "pthread_equal",
    "pthread_getspecific",
    "pthread_mutex_destroy",
    "pthread_mutex_init",
    "pthread_mutex_lock",
    "pthread_mutex_trylock",
    "pthread_mutex_unlock",
    "pthread_rwlock_rdlock",
    "pthread_rwlock_tryrdlock",
    "pthread_rwlock_trywrlock",
    "pthread_rwlock_unlock",
    "pthread_rwlock_wrlock",
    "pthread_self",
    "pthread_setspecific",
    "pthread_spin_lock",
    "pthread_spin_unlock",
    "rand",
    "random",
    "realloc",
    "rint",
    "round",
    "sched_yield",
    "sin",
    "snprintf",
    "sprintf",
    "sqrt",
    "srand",
    "stpcpy",
    "strcasecmp",
    "strcat",
    "strchr",
    "strchrnul",
    "strcmp",
    "strcpy",
    "strcspn",
    "strdup",
    "strerror_r",
    "strlen",
    "strncasecmp",
    "strncat",
    "strncmp",
    "strncpy",
    "strndup",
    "strnlen",
    "strpbrk",
    "strrchr",
    "strspn",
    "strstr",
    "strtod",
    "strtok_r",
    "strtol",
    "strtoll",
    "strtoul",
    "strtoull",
    "tan",
    "time",
    "tolower",
    "toupper",
    "trunc",
    "vsnprintf",
    "wcslen",
    "wmemcpy",
];

/// What only modules with exceptions import.
const THROWERS: &[&str] = &["_Unwind_RaiseException", "__cxa_throw", "__gxx_personality_v0", "__cxa_rethrow"];

/// What one function may do that throws, and whom it calls.
struct Calls {
    throws: bool,
    callees: Vec<u32>,
}

/// The functions that may be on the stack of a throw, if the copies are not registered with the unwinder: those that call,
/// directly or not, something that may throw: a function of another module that is not in [`NOTHROW`], or any function
/// through a pointer. Empty for modules without exceptions (C), and if the unwinder knows the copies.
#[must_use]
pub fn may_unwind(image: &Image, functions: &Functions, targets: &TargetIndex, options: Options) -> FunctionSet {
    let mut set = FunctionSet(vec![0; functions.len().div_ceil(64)]);
    let capable = options.others_throw
        || functions.all().iter().any(|f| f.has_personality)
        || image.imports().any(|n| THROWERS.contains(&n));
    if options.unwind_registered || !capable {
        return set;
    }
    let calls: Vec<Calls> =
        functions.all().par_iter().with_min_len(64).map(|f| calls_of(image, functions, targets, f)).collect();

    // Callers of each function, as one array with a start for each: the graph has a million edges in a large module.
    let mut starts = vec![0u32; functions.len() + 1];
    for callee in calls.iter().flat_map(|c| &c.callees) {
        starts[*callee as usize + 1] += 1;
    }
    for i in 1..starts.len() {
        starts[i] += starts[i - 1];
    }
    let mut callers = vec![0u32; starts[functions.len()] as usize];
    let mut fill = starts.clone();
    for (caller, c) in calls.iter().enumerate() {
        for &callee in &c.callees {
            callers[fill[callee as usize] as usize] = caller as u32;
            fill[callee as usize] += 1;
        }
    }
    let mut work: Vec<u32> = Vec::new();
    for (i, _) in calls.iter().enumerate().filter(|(_, c)| c.throws) {
        set.insert(i);
        work.push(i as u32);
    }
    while let Some(i) = work.pop() {
        for &caller in &callers[starts[i as usize] as usize..starts[i as usize + 1] as usize] {
            if set.insert(caller as usize) {
                work.push(caller);
            }
        }
    }
    set
}

fn calls_of(image: &Image, functions: &Functions, targets: &TargetIndex, f: &Function) -> Calls {
    let mut calls = Calls { throws: false, callees: Vec::new() };
    let Some(bytes) = image.bytes(f.start, f.size as usize) else { return calls };
    let mut decoder = Decoder::with_ip(64, bytes, f.start.0, DecoderOptions::NONE);
    let mut instr = Instruction::default();
    let mut computed = false;
    while decoder.can_decode() && !calls.throws {
        decoder.decode_out(&mut instr);
        let near = instr.op_count() > 0 && instr.op0_kind() == OpKind::NearBranch64;
        match instr.flow_control() {
            FlowControl::Call | FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch if near => {
                let target = LinkAddr(instr.near_branch64());
                if f.contains(target) {
                    continue;
                }
                match functions.index_at(target) {
                    Some(i) => calls.callees.push(i as u32),
                    None => calls.throws |= !image.plt_name(target).is_some_and(nothrow),
                }
            }
            FlowControl::IndirectCall | FlowControl::IndirectBranch if instr.is_ip_rel_memory_operand() => {
                let slot = LinkAddr(instr.ip_rel_memory_address());
                match image.pointer_at(slot).and_then(|t| functions.index_at(t)) {
                    // A symbol of this module may be replaced by another module's.
                    Some(i) if image.got_name(slot).is_none() => calls.callees.push(i as u32),
                    _ => calls.throws |= !image.got_name(slot).is_some_and(nothrow),
                }
            }
            FlowControl::IndirectCall => calls.throws = true,
            FlowControl::IndirectBranch => computed = true,
            _ => {}
        }
    }
    if computed && !calls.throws {
        // A jump through a table stays in the function (or its cold part); any other may be a call.
        match cfg::build(image, functions, targets, f) {
            Ok(graph) => {
                for b in &graph.blocks {
                    calls.throws |= b.terminator == Terminator::Indirect { table: None };
                }
                let leaving = graph.jump_tables.iter().flat_map(|t| &t.targets).filter(|t| !f.contains(**t));
                calls.callees.extend(leaving.filter_map(|&t| functions.index_at(t)).map(|i| i as u32));
            }
            Err(_) => calls.throws = true,
        }
    }
    calls.callees.sort_unstable();
    calls.callees.dedup();
    calls
}

fn nothrow(name: &str) -> bool {
    NOTHROW.contains(&name.split('@').next().unwrap_or(name))
}
