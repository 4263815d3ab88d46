//! Compiles small programs to look at, and finds stock binaries.

#![allow(dead_code, reason = "each test file uses its own part")]

use dyni_analyzer::cfg::{self, Block, Cfg, GiveUp};
use dyni_analyzer::functions::{Function, Functions};
use dyni_analyzer::image::Image;
use dyni_analyzer::targets::TargetIndex;
use dyni_schema::LinkAddr;
use std::process::{Command, Stdio};

/// A module with all that is known of it.
pub struct Module {
    pub image: Image,
    pub functions: Functions,
    pub targets: TargetIndex,
}

impl Module {
    pub fn of(image: Image) -> Self {
        let functions = Functions::find(&image);
        let targets = TargetIndex::build(&image, &functions);
        Self { image, functions, targets }
    }

    /// The function of this name.
    pub fn function(&self, name: &str) -> Function {
        let (start, ..) = self.image.symbols().find(|s| s.2 == name).unwrap_or_else(|| panic!("{name} has a symbol"));
        *self.functions.starting_at(start).unwrap_or_else(|| panic!("{name} has an FDE"))
    }

    /// The address of this symbol.
    pub fn symbol(&self, name: &str) -> LinkAddr {
        self.image.symbols().find(|s| s.2 == name).unwrap_or_else(|| panic!("{name} has a symbol")).0
    }

    pub fn try_graph(&self, name: &str) -> Result<Cfg, GiveUp> {
        cfg::build(&self.image, &self.functions, &self.targets, &self.function(name))
    }

    pub fn graph(&self, name: &str) -> Cfg {
        let graph = self.try_graph(name).unwrap_or_else(|e| panic!("{name} {}", e.text()));
        check(&graph);
        graph
    }
}

/// What holds for every graph.
pub fn check(g: &Cfg) {
    assert_eq!(g.blocks[0].start, g.start, "the entry comes first");
    assert!(g.blocks.windows(2).all(|w| w[0].end <= w[1].start), "blocks overlap");
    for b in &g.blocks {
        assert!(b.start <= b.last && b.last < b.end && b.end <= g.end, "{b:?}");
        assert!(b.successors.iter().all(|&s| (s as usize) < g.blocks.len()), "{b:?}");
    }
}

/// The block that starts at an address.
pub fn block(g: &Cfg, at: LinkAddr) -> &Block {
    &g.blocks[g.block_at(at).unwrap_or_else(|| panic!("a block starts at {at}: {:#?}", g.blocks))]
}

/// Whether there is a compiler of this name; prints that a test is skipped if not.
pub fn has(compiler: &str) -> bool {
    let found = Command::new(compiler).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        println!("SKIPPED: there is no {compiler}");
    }
    found
}

/// Compiles a source text (`ending`: c, cc or S); the bytes of the result.
pub fn compile_with(compiler: &str, source: &str, ending: &str, options: &[&str]) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (input, output) = (dir.path().join(format!("t.{ending}")), dir.path().join("t"));
    std::fs::write(&input, source).expect("the source can be written");
    let run = Command::new(compiler).args(options).arg("-o").arg(&output).arg(&input).output().expect("it runs");
    assert!(run.status.success(), "{compiler} {options:?}: {}", String::from_utf8_lossy(&run.stderr));
    std::fs::read(&output).expect("the output can be read")
}

/// The same with `cc`, parsed and indexed.
pub fn compile(source: &str, ending: &str, options: &[&str]) -> Module {
    Module::of(Image::parse(compile_with("cc", source, ending, options), "t").expect("a good file"))
}

/// A shared object of assembly text. Functions are made by [`function`].
pub fn assemble(source: &str) -> Module {
    compile(&format!("{source}\n.section .note.GNU-stack,\"\",@progbits\n"), "S", &["-shared", "-nostdlib"])
}

/// Assembly text of a function with an FDE.
pub fn function(name: &str, body: &str) -> String {
    format!(
        ".text\n.globl {name}\n.type {name},@function\n{name}:\n.cfi_startproc\n{body}\n.cfi_endproc\n.size {name},.-{name}\n"
    )
}

/// A stock binary, or a printed reason why the test is skipped.
pub fn stock(path: &str) -> Option<Image> {
    match std::fs::read(path) {
        Ok(bytes) => Some(Image::parse(bytes, path).expect("a stock binary is a good file")),
        Err(e) => {
            println!("SKIPPED: {path}: {e}");
            None
        }
    }
}
