//! Random moments that are the same in every run: the seed is the test's name, or `DYNI_TEST_SEED`.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

/// xorshift64*.
pub struct Rng(u64);

impl Rng {
    /// Seeded from a name. `DYNI_TEST_SEED` changes all of them at once, for a soak.
    pub fn new(name: &str) -> Self {
        let mut h = DefaultHasher::new();
        name.hash(&mut h);
        std::env::var("DYNI_TEST_SEED").unwrap_or_default().hash(&mut h);
        Self(h.finish() | 1)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    /// Sleeps for anything up to `most`.
    pub fn sleep(&mut self, most: Duration) {
        let ns = self.below(most.as_nanos() as u64);
        std::thread::sleep(Duration::from_nanos(ns));
    }
}
