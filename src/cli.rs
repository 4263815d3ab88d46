//! The command line: the one definition that the parser, the help, the man pages and the completions come from.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, ArgGroup, Args, Parser, Subcommand, ValueEnum};

use crate::config::parse;
use crate::duration;

/// Makes running programs faster without rebuilding, relinking, reconfiguring or restarting them.
///
/// dyni profiles a live process, decides a better layout for its hot machine code, writes that code into the process, and
/// can take it out again.
#[derive(Debug, Parser)]
#[command(name = "dyni", version, arg_required_else_help = true, after_help = AFTER_HELP)]
pub struct Cli {
    /// Options that every subcommand takes.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Print the names of the places at which tests can make dyni fail
    #[arg(long, hide = true)]
    pub list_failpoints: bool,
}

impl Cli {
    /// What `dyni exec -- COMMAND …` means, with the environment's archive.
    pub fn for_exec(command: Vec<OsString>) -> Self {
        let archive = std::env::var_os("DYNI_ARCHIVE").filter(|v| !v.is_empty()).map(PathBuf::from);
        let global =
            Global { json: false, quiet: false, verbose: 0, archive, config: None, socket: None, direct: false };
        let args = ExecArgs { command, ..ExecArgs::default() };
        Self { global, command: Some(Command::Exec(args)), list_failpoints: false }
    }
}

impl Default for ExecArgs {
    fn default() -> Self {
        Self {
            wait: Duration::from_millis(3),
            learn: false,
            duration: Duration::from_secs(10),
            early: false,
            command: Vec::new(),
        }
    }
}

const AFTER_HELP: &str = "\
Exit status: 0 done; 1 failed, the target is as it was; 2 wrong usage; 3 refused, with the reason.
First steps: `dyni demo`, then `dyni doctor -p PID` and `dyni optimize -p PID`.";

/// Options that every subcommand takes.
#[derive(Debug, Args)]
pub struct Global {
    /// Print one JSON document on stdout instead of text
    #[arg(long, global = true)]
    pub json: bool,
    /// Print nothing but errors (and what --json prints)
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Print more
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// The archive of profiles and plans [default: /var/lib/dyni/archive.db for root, otherwise
    /// $XDG_DATA_HOME/dyni/archive.db]
    #[arg(long, global = true, value_name = "PATH", env = "DYNI_ARCHIVE")]
    pub archive: Option<PathBuf>,
    /// The configuration of the daemon [default: /etc/dyni.conf]
    #[arg(long, global = true, value_name = "FILE", env = "DYNI_CONFIG")]
    pub config: Option<PathBuf>,
    /// The daemon's control socket [default: /run/dyni/control.sock for root, otherwise
    /// $XDG_RUNTIME_DIR/dyni/control.sock]
    #[arg(long, global = true, value_name = "PATH", env = "DYNI_SOCKET")]
    pub socket: Option<PathBuf>,
    /// Leave a running daemon out of it
    #[arg(long, global = true, conflicts_with = "socket")]
    pub direct: bool,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Do the main job on a built-in target, with nothing to install
    Demo(DemoArgs),
    /// Record where a running program spends its time, and keep the profile
    Record(RecordArgs),
    /// Make a plan from a profile, print it and keep it
    Analyze(AnalyzeArgs),
    /// Write a plan's code into a running program
    Apply(ApplyArgs),
    /// Record, analyze and apply in one go
    Optimize(OptimizeArgs),
    /// Start a program with what is stored for it: its plan, its working set
    Exec(ExecArgs),
    /// Run the daemon: find programs worth optimising, optimise them, follow their work
    Daemon(DaemonArgs),
    /// Start the daemon in the background
    Start(DaemonArgs),
    /// Stop the daemon; what is optimised stays so
    Stop,
    /// Optimise a program anew, or all that the daemon follows
    Redo(RedoArgs),
    /// Take the code out again
    Undo(UndoArgs),
    /// Show what is optimised, and what the daemon is about
    Status(StatusArgs),
    /// Write what perf and gdb have to know of the code in a running program
    Symbols(SymbolsArgs),
    /// Show the daemon's programs, live
    Top(TopArgs),
    /// Show how well an optimised program's code still fits its work
    Drift(DriftArgs),
    /// Show what this host, a process or a file allows, what not, and why
    Doctor(DoctorArgs),
    /// Check a binary that need not run with a profile: does this build keep its layout? For CI
    Check(crate::check::CheckArgs),
    /// Compare plans
    Plan(PlanArgs),
    /// List, show, share and throw away the profiles and plans that are kept
    Archive(crate::archive::ArchiveArgs),
    /// Read the daemon's configuration and say what it means
    Config(ConfigArgs),
    /// Print the man page, or write one for each subcommand
    #[command(hide = true)]
    Man(ManArgs),
    /// Print a shell's completion script
    #[command(hide = true)]
    Completions(CompletionsArgs),
}

/// `dyni demo`
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// How long to record
    #[arg(long, default_value = "5s", value_parser = duration::parse, value_name = "TIME")]
    pub duration: Duration,
}

/// How to record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MethodArg {
    /// The best that works here
    Auto,
    /// Branch stacks of the hardware
    Lbr,
    /// Hardware cycles
    Cycles,
    /// The kernel's clock
    Clock,
    /// Stopping threads with ptrace
    Ptrace,
    /// Exact counts from an instrumented generation
    Count,
}

/// `dyni record`
#[derive(Debug, Args)]
pub struct RecordArgs {
    /// The process: a PID, or the name of its executable
    #[arg(short, long, value_name = "PID|NAME")]
    pub pid: String,
    /// How long
    #[arg(long, default_value = "10s", value_parser = duration::parse, value_name = "TIME")]
    pub duration: Duration,
    /// How
    #[arg(long, default_value = "auto", value_enum)]
    pub method: MethodArg,
    /// Record which pages of its files it has touched by then, instead of where its time goes
    #[arg(long, conflicts_with_all = ["method", "label"])]
    pub working_set: bool,
    /// What to call the recording
    #[arg(long, default_value = "", value_name = "TEXT", hide_default_value = true)]
    pub label: String,
}

/// `dyni analyze`
#[derive(Debug, Args)]
pub struct AnalyzeArgs {
    /// The profile: an id or its beginning as `dyni archive ls` prints it, a label, or a program's name [default: the
    /// newest]
    pub profile: Option<String>,
    /// Run these passes only: names with commas between them, `all` or `none`
    #[arg(long, value_name = "LIST")]
    pub passes: Option<String>,
    /// Say what was decided about this function (a name or an address), and why
    #[arg(long, value_name = "FUNCTION")]
    pub explain: Option<String>,
    /// Make the plan for this file, which may be another build of a module of the profile: what was recorded is carried over,
    /// as far as it matches
    #[arg(long, value_name = "FILE")]
    pub binary: Option<PathBuf>,
}

/// `dyni apply`
#[derive(Debug, Args)]
pub struct ApplyArgs {
    /// The process: a PID, or the name of its executable
    #[arg(short, long, value_name = "PID|NAME")]
    pub pid: String,
    /// The plan: an id or its beginning [default: the newest for this program]
    #[arg(long, value_name = "ID")]
    pub plan: Option<String>,
    /// Do everything but change the process
    #[arg(long)]
    pub dry_run: bool,
    /// Do this and nothing else
    #[arg(long, value_enum, conflicts_with = "dry_run")]
    pub only: Option<OnlyArg>,
    /// Apply the plan's first N functions only, to find by halving the one that is at fault
    #[arg(long, value_name = "N", hide = true)]
    pub fuel: Option<u64>,
}

/// What `dyni apply --only` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnlyArg {
    /// Move the program's own code to huge pages: what the plan's functions lie in, or all of it without a plan
    HugeText,
}

/// `dyni optimize`
#[derive(Debug, Args)]
pub struct OptimizeArgs {
    /// The process: a PID, or the name of its executable
    #[arg(short, long, value_name = "PID|NAME")]
    pub pid: String,
    /// How long to record
    #[arg(long, default_value = "10s", value_parser = duration::parse, value_name = "TIME")]
    pub duration: Duration,
    /// Print a JSON document at the beginning of each step
    #[arg(long, hide = true, requires = "json")]
    pub phases: bool,
}

/// `dyni exec`
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// The longest that the program waits, at its first instruction, for its plan to be in force; a plan that takes longer
    /// is applied while it runs
    #[arg(long, default_value = "3ms", value_parser = duration::parse, value_name = "TIME")]
    pub wait: Duration,
    /// Record which pages of its files the program touches, and keep that for its next starts; this once it runs without
    /// its plan
    #[arg(long)]
    pub learn: bool,
    /// Until when after the start pages are recorded
    #[arg(long, default_value = "10s", value_parser = duration::parse, value_name = "TIME")]
    pub duration: Duration,
    /// Read what it will need before it starts rather than while it starts
    #[arg(long, conflicts_with = "learn")]
    pub early: bool,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// `dyni daemon` and `dyni start`
#[derive(Clone, Debug, Args)]
pub struct DaemonArgs {
    /// What it is to do.
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Serve metrics for Prometheus on a Unix socket or a loopback address: unix:PATH or 127.0.0.1:PORT
    #[arg(long, value_name = "ADDRESS")]
    pub metrics: Option<String>,
    /// End when as many programs as are to be worked on at once are dynimized, or can't be
    #[arg(long)]
    pub once: bool,
    /// Don't read ahead what programs that start are known to touch
    #[arg(long)]
    pub no_read_ahead: bool,
    /// Over which time the use of the processor is measured
    #[arg(long, default_value = "10s", value_parser = parse::window, value_name = "TIME", hide = true)]
    pub cpu_window: Duration,
    /// How often the drift of a dynimized program is measured
    #[arg(long, default_value = "5min", value_parser = parse::window, value_name = "TIME", hide = true)]
    pub watch_every: Duration,
    /// Detach from the terminal and log to a file
    #[arg(long, hide = true)]
    pub background: bool,
}

/// `dyni redo`
#[derive(Debug, Args)]
pub struct RedoArgs {
    /// The program: a PID, or the name of its executable [default: every program that the daemon follows]
    #[arg(short, long, value_name = "PID|NAME")]
    pub pid: Option<String>,
    /// Without a daemon: how long to record [default: as configured]
    #[arg(long, value_name = "TIME", value_parser = parse::window)]
    pub window: Option<Duration>,
}

/// `dyni top`
#[derive(Debug, Args)]
pub struct TopArgs {
    /// How often it is drawn anew
    #[arg(long, default_value = "1s", value_parser = duration::parse, value_name = "TIME")]
    pub every: Duration,
    /// Print it once and end
    #[arg(long)]
    pub once: bool,
}

/// `dyni drift`
#[derive(Debug, Args)]
pub struct DriftArgs {
    /// The process: a PID, or the name of its executable
    #[arg(short, long, value_name = "PID|NAME")]
    pub pid: String,
    /// How long to look
    #[arg(long, default_value = "5s", value_parser = duration::parse, value_name = "TIME")]
    pub duration: Duration,
}

/// `dyni undo`
#[derive(Debug, Args)]
#[group(skip)]
#[command(group = ArgGroup::new("which").required(true).args(["pid", "all"]))]
pub struct UndoArgs {
    /// The process: a PID, or the name of its executable
    #[arg(short, long, value_name = "PID|NAME")]
    pub pid: Option<String>,
    /// Every process on this host that is optimised
    #[arg(long)]
    pub all: bool,
    /// Free all that nothing refers to any more, rather than when more of it has come together
    #[arg(long)]
    pub free: bool,
}

/// `dyni status`
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The process: a PID, or the name of its executable [default: every process that is optimised]
    #[arg(short, long, value_name = "PID|NAME")]
    pub pid: Option<String>,
}

/// `dyni symbols`
#[derive(Debug, Args)]
pub struct SymbolsArgs {
    /// The process: a PID, or the name of its executable
    #[arg(short, long, value_name = "PID|NAME")]
    pub pid: String,
    /// Write the symbols and call frames of this one process into an ELF file, for gdb's `add-symbol-file` [default: write a
    /// perf map, /tmp/perf-PID.map, for each process of the program]
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// `dyni doctor`
#[derive(Debug, Args)]
#[group(required = false, multiple = false)]
pub struct DoctorArgs {
    /// A process: a PID, or the name of its executable
    #[arg(short, long, value_name = "PID|NAME")]
    pub pid: Option<String>,
    /// A program or library that need not run
    #[arg(long, value_name = "FILE")]
    pub exe: Option<PathBuf>,
}

/// `dyni config`
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// What to do with it.
    #[command(subcommand)]
    pub verb: ConfigVerb,
}

/// `dyni config …`
#[derive(Debug, Subcommand)]
pub enum ConfigVerb {
    /// Check the file that --config names, or /etc/dyni.conf, as the daemon would read it
    Check,
}

/// What the daemon is to do, over what its configuration says.
#[derive(Clone, Debug, Default, Args)]
pub struct LimitArgs {
    /// Only this process (may be given several times)
    #[arg(short, long, value_name = "PID")]
    pub pid: Vec<i32>,
    /// Only programs of this name instead of those that are configured (may be given several times)
    #[arg(long, value_name = "NAME", conflicts_with = "pid")]
    pub exe: Vec<String>,
    /// How many programs are profiled or dynimized at once [default: 1]
    #[arg(long, value_name = "N", value_parser = parse::count)]
    pub n_programs: Option<usize>,
    /// How old a program has to be before it is touched [default: 60s]
    #[arg(long, value_name = "TIME", value_parser = parse::delay)]
    pub delay: Option<Duration>,
    /// For how long a program is profiled [default: 90s]
    #[arg(long, value_name = "TIME", value_parser = parse::window)]
    pub window: Option<Duration>,
    /// How much of one processor a program must use, percent as top counts it [default: 10]
    #[arg(long, value_name = "PERCENT", value_parser = parse::cpu_usage)]
    pub cpu_usage: Option<f64>,
    /// Optimise a program anew once its work has changed
    #[arg(long)]
    pub reoptimize: bool,
    /// The log file [default: /var/log/dyni.log for root, otherwise $XDG_STATE_HOME/dyni.log]
    #[arg(long, value_name = "PATH")]
    pub log: Option<PathBuf>,
}

/// `dyni plan`
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// What to do with plans.
    #[command(subcommand)]
    pub verb: PlanVerb,
}

/// The subcommands of `dyni plan`.
#[derive(Debug, Subcommand)]
pub enum PlanVerb {
    /// Say what two plans decide otherwise, and why
    Diff {
        /// The first plan: an id or its beginning, as `dyni archive ls` prints it
        #[arg(value_name = "A")]
        a: String,
        /// The second
        #[arg(value_name = "B")]
        b: String,
    },
}

/// `dyni man`
#[derive(Debug, Args)]
pub struct ManArgs {
    /// Write dyni.1 and a page for each subcommand into this folder
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// `dyni completions`
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// Which shell
    pub shell: clap_complete::Shell,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    fn kind(words: &[&str]) -> Option<ErrorKind> {
        Cli::try_parse_from([&["dyni"], words].concat()).err().map(|e| e.kind())
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn undo_wants_one_of_a_process_and_all() {
        assert_eq!(kind(&["undo"]), Some(ErrorKind::MissingRequiredArgument));
        assert_eq!(kind(&["undo", "-p", "7", "--all"]), Some(ErrorKind::ArgumentConflict));
        assert_eq!(kind(&["undo", "--all"]), None);
    }

    #[test]
    fn global_options_go_before_or_after_the_subcommand() {
        for words in [["--json", "status"], ["status", "--json"]] {
            let cli = Cli::try_parse_from([&["dyni"], &words[..]].concat()).unwrap();
            assert!(cli.global.json);
        }
    }

    #[test]
    fn a_command_in_short_has_the_defaults() {
        let long = Cli::try_parse_from(["dyni", "exec", "--", "ls", "-l"]).unwrap();
        let short = Cli::for_exec(["ls", "-l"].map(OsString::from).to_vec());
        assert_eq!(format!("{:?}", long.command), format!("{:?}", short.command));
    }

    #[test]
    fn durations_are_checked_where_they_are_read() {
        assert_eq!(kind(&["record", "-p", "7", "--duration", "10parsecs"]), Some(ErrorKind::ValueValidation));
        assert_eq!(kind(&["record", "-p", "7", "--duration", "500ms"]), None);
    }
}
