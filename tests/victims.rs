//! Every victim, by every compiler and level, through fifty applies and undos.
//!
//! One test each, so that a failure names the behaviour, the compiler and the level: `exceptions::clang_o3`.

mod common;

use common::build::variant;
use common::cycles::{self, Effort, Expect};

macro_rules! victims {
    ($($name:ident: $expect:ident;)*) => {
        $(
            mod $name {
                use super::*;

                #[test]
                fn gcc_o2() {
                    cycles::run(stringify!($name), &variant::gcc_o2, Expect::$expect, Effort::FULL);
                }

                victims!(@short $name $expect gcc_o0 gcc_o3 clang_o0 clang_o2 clang_o3);
            }
        )*
    };
    (@short $name:ident $expect:ident $($variant:ident)*) => {
        $(
            #[test]
            fn $variant() {
                cycles::run(stringify!($name), &variant::$variant, Expect::$expect, Effort::SHORT);
            }
        )*
    };
}

/// Link forms and options that change what dyni has to find or to reach.
macro_rules! also {
    ($($module:ident $name:ident $expect:ident: $($variant:ident)*;)*) => {
        $(
            mod $module {
                use super::*;
                victims!(@short $name $expect $($variant)*);
            }
        )*
    };
}

victims! {
    recursion: Watched;
    threads: Watched;
    thread_storm: Served;
    forks: Racing;
    execs: Racing;
    signals: Served;
    longjmp: Served;
    coroutines: Watched;
    switches: Watched;
    gotos: Watched;
    tailcalls: Watched;
    cold: Watched;
    stacks: Watched;
    handasm: Served;
    flags: Watched;
    // Between a dlclose and the next dlopen there is nothing to patch, or to find patched.
    plugins: Racing;
    sandbox: Served;
    // Most of the time goes into the kernel, and what is sampled may be the library alone.
    vforks: Somewhere;
    selfmod: Maybe;
    endless: InCopy;
    retaddr_pop: Maybe;
    retaddr_builtin: Maybe;
    eintr: Served;
    eintr_epoll: Served;
    blocked: Served;
    server: Served;
    fpstate: Watched;
    redzone: Watched;
    indirect: Watched;
    usual: Watched;
    cancel: Somewhere;
    timers: Served;
    jobctl: Served;
    trapskip: Served;
    rseq: Maybe;
    unwind: Somewhere;
    // Most of the time goes into the unwinder.
    exceptions: Somewhere;
    vtables: Watched;
    // Its threads wait for one another alone or are gone at once: at times none is met that can tell the unwinder of copies.
    cpp_threads: Maybe;
    foreign: Served;
    noexcepts: Racing;
    odd_maps: Watched;
}

also! {
    threads_linked threads Watched: gcc_cet gcc_no_pie clang_no_pie;
    signals_linked signals Served: gcc_no_pie;
    switches_linked switches Watched: gcc_cet gcc_no_pie clang_no_pie;
    gotos_linked gotos Watched: gcc_cet gcc_no_pie clang_no_pie;
    stacks_linked stacks Watched: gcc_avx gcc_no_pie;
    endless_linked endless InCopy: gcc_no_pie;
    exceptions_linked exceptions Maybe: gcc_cet gcc_no_pie gcc_static gcc_static_pie;
    indirect_linked indirect Watched: gcc_cet;
    usual_linked usual Watched: gcc_cet gcc_no_pie clang_no_pie;
    selfmod_linked selfmod Maybe: gcc_toggle gcc_no_pie;
    // A static program has the C library's cleanup tables and an unwinder of its own that can't be told of copies, so
    // functions through which a cancellation may unwind stay in the original.
    threads_static threads Maybe: gcc_static gcc_static_pie;
    signals_static signals Maybe: gcc_static_pie;
    switches_static switches Maybe: gcc_static gcc_static_pie;
    gotos_static gotos Maybe: gcc_static gcc_static_pie;
    endless_static endless Maybe: gcc_static;
    indirect_static indirect Maybe: gcc_static_pie;
    server_static server Maybe: gcc_static;
}
