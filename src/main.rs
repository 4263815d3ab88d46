//! The `dyni` command.
//!
//! One file per subcommand; the work itself is done by the libraries, imports point down to them. A subcommand is a
//! function from its arguments to a printed [`Report`](output::Report) or a [`Failure`], so that what is
//! printed, and with which exit status the command ends, is decided in one place.

mod analyze;
mod apply;
mod archive;
mod check;
mod cli;
mod config;
mod count;
mod daemon;
mod demo;
mod doctor;
mod drift;
mod duration;
mod dynimize;
mod errors;
mod examine;
mod exec;
mod gain;
mod huge_text;
mod interrupt;
mod manual;
mod modules;
mod optimize;
mod output;
mod pays;
mod perf_map;
mod plan_diff;
mod rebuilt;
mod record;
mod status;
mod store;
mod symbols;
mod targets;
mod top;
mod undo;

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use cli::{Cli, Command};
use daemon::control;
use daemon::protocol::Contact;
use errors::Failure;
use output::Output;
use store::Store;

fn main() -> ExitCode {
    errors::install_panic_hook();
    if let Some(command) = exec::in_short(std::env::args_os()) {
        let cli = Cli::for_exec(command);
        let out = Output::new(&cli.global);
        // The parser's tables alone take longer to build than a small program runs.
        return ending(catch_unwind(AssertUnwindSafe(|| run(cli, out))), out);
    }
    let words = match dynimize::translate(std::env::args_os().collect()) {
        Ok(dynimize::Line::Words(words)) => words,
        Ok(dynimize::Line::Answer(text)) => {
            // A closed stdout is no failure: there was nothing to do.
            let _ = writeln!(std::io::stdout().lock(), "{text}");
            return ExitCode::SUCCESS;
        }
        Err(failure) => {
            failure.print(false);
            return failure.exit_code();
        }
    };
    let cli = match Cli::try_parse_from(words) {
        Ok(cli) => cli,
        Err(e) => return not_parsed(&e),
    };
    let out = Output::new(&cli.global);
    ending(catch_unwind(AssertUnwindSafe(|| run(cli, out))), out)
}

fn ending(result: std::thread::Result<Result<(), Failure>>, out: Output) -> ExitCode {
    match result {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(failure)) => {
            failure.print(out.json());
            failure.exit_code()
        }
        Err(payload) => {
            // The panic hook has printed the text.
            let failure = errors::from_panic(payload.as_ref());
            if out.json() {
                errors::print_json_only(&failure);
            }
            failure.exit_code()
        }
    }
}

fn run(cli: Cli, out: Output) -> Result<(), Failure> {
    if cli.list_failpoints {
        return manual::failpoints();
    }
    let Some(command) = cli.command else {
        return Err(Failure::usage("nothing to do", "no subcommand was given").help("`dyni --help` lists them"));
    };
    if only_prints(&command) {
        end_quietly_when_nobody_reads();
    }
    let store = Store::at(cli.global.archive.as_deref());
    let contact = Contact::at(cli.global.socket.as_deref());
    let running = (!cli.global.direct).then_some(&contact);
    let config = cli.global.config.as_deref();
    match command {
        Command::Demo(args) => demo::run(&args, out),
        Command::Record(args) => record::run(&args, &store, out),
        Command::Analyze(args) => analyze::run(&args, &store, out),
        Command::Apply(args) => apply::run(&args, &store, out),
        Command::Optimize(args) => optimize::run(&args, &store, out),
        Command::Exec(args) => exec::run(&args, &store, out),
        Command::Daemon(args) => daemon::run(&args, config, &contact, store.path()?),
        Command::Start(args) => control::start(&args, config, &contact, &store.path()?, out),
        Command::Stop => control::stop(&contact, out),
        Command::Redo(args) => control::redo(&args, config, running, &store, out),
        Command::Undo(args) => undo::run(&args, running, out),
        Command::Status(args) => status::run(&args, running, out),
        Command::Top(args) => top::run(&args, &contact, out),
        Command::Drift(args) => drift::run(&args, out),
        Command::Symbols(args) => symbols::run(&args, out),
        Command::Doctor(args) => doctor::run(&args, out),
        Command::Check(args) => check::run(&args, out),
        Command::Plan(args) => match args.verb {
            cli::PlanVerb::Diff { a, b } => plan_diff::run(&a, &b, &store, out),
        },
        Command::Archive(args) => archive::run(&args, &store.path()?, out),
        Command::Config(args) => match args.verb {
            cli::ConfigVerb::Check => config::check::run(config, out),
        },
        Command::Man(args) => manual::man(&args, Cli::command()),
        Command::Completions(args) => manual::completions(&args, Cli::command()),
    }
}

/// Whether a command changes nothing outside the archive, so that it may end at any output.
const fn only_prints(command: &Command) -> bool {
    match command {
        Command::Analyze(_)
        | Command::Status(_)
        | Command::Drift(_)
        | Command::Doctor(_)
        | Command::Plan(_)
        | Command::Archive(_)
        | Command::Config(_)
        | Command::Man(_)
        | Command::Completions(_) => true,
        // They hold a process or children, or write files; a closed pipe must not end them half-way.
        Command::Demo(_)
        | Command::Record(_)
        | Command::Apply(_)
        | Command::Optimize(_)
        | Command::Exec(_)
        | Command::Check(_)
        | Command::Undo(_)
        | Command::Symbols(_)
        | Command::Daemon(_)
        | Command::Start(_)
        | Command::Stop
        | Command::Redo(_)
        // It puts the terminal right at its end.
        | Command::Top(_) => false,
    }
}

/// Lets the kernel end this process at a write to a closed pipe (`dyni archive ls | head`), as other tools do. Rust's
/// start-up code ignores the signal, and each `println!` would then be a panic.
fn end_quietly_when_nobody_reads() {
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: the default action is no code of ours.
    let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
}

/// What clap has to say: help and version are no errors, everything else is wrong usage.
fn not_parsed(error: &clap::Error) -> ExitCode {
    // Nobody is left to tell if this can't be printed.
    let _ = error.print();
    if !error.use_stderr() {
        return ExitCode::SUCCESS;
    }
    let failure = Failure::usage("wrong usage", error.kind()).help("`dyni --help` lists the subcommands and options");
    if std::env::args_os().any(|word| word == "--json") {
        errors::print_json_only(&failure);
    }
    failure.exit_code()
}
