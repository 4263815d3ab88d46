//! What every version wrote stays readable, and the newest is still what is written.
//!
//! A golden blob is never rewritten. When a record gets a new version, its old blob stays and a new one is added: with
//! `DYNI_WRITE_GOLDEN=1` a missing blob is written.

mod common;

use dyni_schema::Shapes;
use dyni_schema::envelope::{self, BlobId, Record};
use std::fmt::Debug;
use std::path::PathBuf;

/// What an older version was: without what came later.
fn opens<T: Record + PartialEq + Debug>(file: &str, value: &T, id: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file);
    let golden = std::fs::read(&path).expect("read golden blob");
    assert_eq!(BlobId::of(&golden).short(), id, "{file} was changed; a golden blob never is");
    assert_eq!(&envelope::open::<T>(&golden).expect("open golden blob"), value);
}

fn check<T: Record + PartialEq + Debug>(file: &str, value: &T, id: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file);
    let sealed = envelope::seal(value).expect("seal");
    if !path.exists() && std::env::var_os("DYNI_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, &sealed).expect("write golden blob");
    }
    let golden = std::fs::read(&path).expect("read golden blob");
    assert_eq!(&envelope::open::<T>(&golden).expect("open golden blob"), value);
    assert_eq!(BlobId::of(&golden).short(), id, "{file} was changed; a golden blob never is");
    // If this fails after an update of zstd: its output changed. Old blobs still open, but the same plan made by the
    // old and the new dyni has two ids.
    assert!(golden == sealed, "{file}: sealing gives other bytes than it did");
}

#[test]
fn profile_version_1() {
    let mut profile = common::golden_profile();
    profile.modules.iter_mut().for_each(|m| m.shapes = Shapes::default());
    opens("profile-v1.dyni", &profile, "f07119ec0c4e");
}

#[test]
fn profile_version_2() {
    assert_eq!(<dyni_schema::Profile as Record>::VERSION, 2);
    check("profile-v2.dyni", &common::golden_profile(), "b8ce81ceed58");
}

#[test]
fn plan_version_1() {
    let mut plan = common::golden_plan();
    plan.modules[1].functions.iter_mut().for_each(|f| f.calls.clear());
    opens("plan-v1.dyni", &plan, "a6eb9b3a3232");
}

#[test]
fn plan_version_2() {
    assert_eq!(<dyni_schema::Plan as Record>::VERSION, 2);
    check("plan-v2.dyni", &common::golden_plan(), "06eb275c39b9");
}

#[test]
fn working_set_version_1() {
    assert_eq!(<dyni_schema::WorkingSet as Record>::VERSION, 1);
    check("working-set-v1.dyni", &common::golden_working_set(), "c52266e7dce0");
}
