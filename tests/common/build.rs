//! Compiles the victims, once per compiler and option set, into target/victims.
//!
//! A victim's first comment says how: `flags:` and `libs:` for the command line, `with:` for a second source file,
//! `plugin:` for a shared object that it loads.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use super::find_program;

/// One way to compile.
#[derive(Clone, Copy, Debug)]
pub struct Variant {
    /// `gcc` or `clang`.
    pub compiler: &'static str,
    /// What makes it different, after the compiler's name.
    pub tag: &'static str,
    /// The options themselves.
    pub flags: &'static [&'static str],
}

/// The variants that tests are named after.
pub mod variant {
    use super::Variant;

    macro_rules! variants {
        ($($name:ident = $compiler:literal, $tag:literal, [$($flag:literal),*];)*) => {
            $(
                #[doc = concat!($compiler, " ", $tag)]
                #[allow(non_upper_case_globals)]
                pub const $name: Variant = Variant { compiler: $compiler, tag: $tag, flags: &[$($flag),*] };
            )*
        };
    }

    variants! {
        gcc_o0 = "gcc", "O0", ["-O0"];
        gcc_o2 = "gcc", "O2", ["-O2"];
        gcc_o3 = "gcc", "O3", ["-O3"];
        clang_o0 = "clang", "O0", ["-O0"];
        clang_o2 = "clang", "O2", ["-O2"];
        clang_o3 = "clang", "O3", ["-O3"];
        gcc_cet = "gcc", "cet", ["-O2", "-fcf-protection=full"];
        gcc_avx = "gcc", "avx", ["-O2", "-mavx2", "-mstackrealign"];
        gcc_no_pie = "gcc", "no-pie", ["-O2", "-no-pie", "-fno-pie"];
        gcc_static = "gcc", "static", ["-O2", "-static", "-no-pie", "-fno-pie"];
        gcc_static_pie = "gcc", "static-pie", ["-O2", "-static-pie", "-fPIE"];
        clang_no_pie = "clang", "no-pie", ["-O2", "-no-pie", "-fno-pie"];
        // ANOTHER changes the build-id and nothing else that matters.
        gcc_other = "gcc", "other", ["-O1", "-DANOTHER"];
        gcc_toggle = "gcc", "toggle", ["-O2", "-DTOGGLE"];
    }
}

/// Where the sources are.
pub fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/victims")
}

/// Where the programs go: beside Cargo's own output, so that `cargo clean` takes them too.
pub fn output() -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("target has a parent").join("victims");
    fs::create_dir_all(&dir).expect("create target/victims");
    dir
}

/// The words after `key:` in a source's first comment.
fn directive(text: &str, key: &str) -> Vec<String> {
    let mark = format!(" * {key}: ");
    text.lines()
        .take(40)
        .filter_map(|l| l.strip_prefix(&mark))
        .flat_map(|l| l.trim_end_matches("*/").split_whitespace())
        .map(str::to_owned)
        .collect()
}

fn newest(files: &[PathBuf]) -> SystemTime {
    let time = |f: &PathBuf| fs::metadata(f).and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    files.iter().map(time).max().unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Runs the compiler into a name of its own and renames, so that tests that build the same thing at once do no harm.
fn compile(compiler: &Path, args: &[String], out: &Path) {
    let tag = format!("{}-{:?}", std::process::id(), std::thread::current().id());
    let tmp = out.with_extension(tag.replace(['(', ')'], ""));
    let done = Command::new(compiler).args(args).arg("-o").arg(&tmp).output().expect("run the compiler");
    let text = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{} {}: {text}", compiler.display(), args.join(" "));
    fs::rename(&tmp, out).expect("rename the program");
}

/// Builds a victim.
///
/// # Errors
/// The reason why it can't be built here: the compiler is not installed.
pub fn victim(name: &str, v: &Variant) -> Result<PathBuf, String> {
    let dir = sources();
    let cpp = dir.join(format!("{name}.cpp"));
    let is_cpp = cpp.is_file();
    let source = if is_cpp { cpp } else { dir.join(format!("{name}.c")) };
    let command = match (v.compiler, is_cpp) {
        ("gcc", true) => "g++",
        ("clang", true) => "clang++",
        (c, _) => c,
    };
    let compiler = find_program(command).ok_or_else(|| format!("{command} is not installed"))?;
    let text = fs::read_to_string(&source).unwrap_or_else(|e| panic!("{}: {e}", source.display()));

    let mut files = vec![source.clone(), dir.join("victim.h")];
    let plugins: Vec<_> = directive(&text, "plugin").iter().map(|f| dir.join(f)).collect();
    let with: Vec<_> = directive(&text, "with").iter().map(|f| dir.join(f)).collect();
    files.extend(plugins.iter().chain(&with).cloned());
    let id = format!("{name}-{}-{}", v.compiler, v.tag);
    let out = output().join(&id);
    let built = fs::metadata(&out).and_then(|m| m.modified());
    if built.is_ok_and(|t| t > newest(&files)) {
        return Ok(out);
    }

    let flags = || v.flags.iter().map(|f| (*f).to_owned());
    let mut args: Vec<String> = flags().collect();
    // Warnings are for whoever writes a victim; the harness only wants it built.
    args.extend(["-g", "-w", "-D_GNU_SOURCE"].map(str::to_owned));
    for plugin in &plugins {
        let so = format!("{id}.so");
        let mut so_args: Vec<String> = flags().filter(|f| f.starts_with("-O")).collect();
        so_args.extend(["-shared", "-fPIC", "-w"].map(str::to_owned));
        so_args.push(plugin.display().to_string());
        compile(&compiler, &so_args, &output().join(&so));
        args.push(format!("-DPLUGIN_NAME=\"{so}\""));
    }
    args.extend(directive(&text, "flags"));
    args.push(source.display().to_string());
    args.extend(with.iter().map(|w| w.display().to_string()));
    args.extend(directive(&text, "libs"));
    compile(&compiler, &args, &out);
    Ok(out)
}
