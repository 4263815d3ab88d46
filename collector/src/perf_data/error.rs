//! Why a recording of perf can't be used, and what to do about it.

/// Why a file can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PerfDataError {
    /// It does not begin as such a file does.
    #[error("it is not a file that `perf record` has written")]
    NotPerfData,
    /// It comes from a machine of another kind.
    #[error("it was recorded on another kind of machine ({0})")]
    OtherMachine(String),
    /// perf did not come to its end.
    #[error("perf did not finish it: it says that it holds no records")]
    Unfinished,
    /// It ends before what it says is in it.
    #[error("it is cut off: {0} are not all there")]
    Truncated(&'static str),
    /// It contradicts itself.
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
    /// It holds what is not read here.
    #[error("it is compressed")]
    Compressed,
    /// Its samples do not say what is needed.
    #[error("its samples say nothing of {0}")]
    Lacks(&'static str),
    /// Its samples are taken at something that tells nothing of time.
    #[error("its samples were taken at events of {0}, which do not tell where time goes")]
    NotTime(String),
    /// There are no samples in it, or none of the program that was asked for.
    #[error("it has no samples in user code of {0}")]
    NoSamples(String),
    /// It is beyond what is read.
    #[error("it has more than {0}")]
    TooLarge(&'static str),
}

impl PerfDataError {
    /// What the reader can do about it.
    #[must_use]
    pub const fn help(&self) -> &'static str {
        match self {
            Self::NotPerfData | Self::Truncated(_) | Self::Damaged(_) => "copy or record it again",
            Self::OtherMachine(_) => "record on x86-64",
            Self::Unfinished => "end perf with an interrupt (Ctrl-C) and not with kill",
            Self::Compressed => "record without -z",
            Self::Lacks(_) | Self::NotTime(_) => {
                "record with `perf record -e cycles:u -b`, or -e cpu-clock where there are no counters"
            }
            Self::NoSamples(_) => "name a program with --program; `perf report --sort comm` lists them",
            Self::TooLarge(_) => "record for a shorter time",
        }
    }
}
