use super::*;

fn refused(recorded: &str, share: f64) -> RefusedFunction {
    let (name, reason) = (Some("a<b>|\"c\"\u{7}".to_owned()), "is too small".to_owned());
    RefusedFunction { recorded: recorded.into(), start: "0x9".into(), name, share, reason }
}

fn facts() -> Facts {
    let built = Figures { taken_branches: 0.4, ext_tsp: 0.5, pages: 20, pages_999: 10, hot_bytes: 5000 };
    Facts {
        check: FORM,
        profile: "ab".repeat(32),
        module: "app".into(),
        build_id: "cd".repeat(20),
        matched: None,
        functions: 12,
        built,
        planned: Figures { taken_branches: 0.2, ..built },
        refused: vec![refused("0x10", 0.01)],
    }
}

fn report(facts: Facts) -> CheckReport {
    CheckReport {
        facts,
        method: "count".into(),
        baseline: None,
        max_regress: 2.0,
        comparisons: Vec::new(),
        newly_refused: Vec::new(),
        regressed: false,
    }
}

fn compared(now: Facts) -> CheckReport {
    let mut report = report(now);
    report.compare(Path::new("base.json"), &facts()).expect("they are of one profile");
    report
}

#[test]
fn what_is_printed_can_be_a_baseline() {
    let printed = serde_json::to_string(&compared(facts())).unwrap();
    assert_eq!(serde_json::from_str::<Facts>(&printed).unwrap(), facts());
}

#[test]
fn the_same_build_passes_in_every_form() {
    let same = compared(facts());
    assert!(!same.regressed && same.newly_refused.is_empty());
    assert!(render::text(&same, Paint::PLAIN).ends_with("no worse than it may be\n"));
    assert!(render::junit(&same).contains("tests=\"9\" failures=\"0\""));
    assert!(!render::markdown(&same).contains("**regressed**"));
}

#[test]
fn a_worse_one_fails_in_every_form() {
    let mut now = facts();
    now.built.taken_branches = 0.44;
    now.refused.push(refused("0x20", 0.05));
    let worse = compared(now);
    assert!(worse.regressed);
    assert_eq!(worse.newly_refused.len(), 1);
    let text = render::text(&worse, Paint::PLAIN);
    assert!(text.contains("+10.00 %  regressed") && text.ends_with("regressed\n"), "{text}");
    let xml = render::junit(&worse);
    assert!(xml.contains("failures=\"2\"") && xml.contains("40.00 % in the baseline, 44.00 % now"), "{xml}");
    let summary = render::markdown(&worse);
    assert!(summary.contains("**regressed**") && summary.contains("a&lt;b&gt;\\|\"c\" "), "{summary}");
}

#[test]
fn names_are_no_markup() {
    let mut now = facts();
    now.module = "a\"><b&\u{1b}".into();
    let xml = render::junit(&report(now));
    assert!(xml.contains("dyni.check.a&quot;&gt;&lt;b&amp;\""), "{xml}");
}

#[test]
fn another_profile_is_not_compared() {
    let mut now = facts();
    now.profile = "ef".repeat(32);
    let failure = report(now).compare(Path::new("base.json"), &facts()).unwrap_err();
    assert_eq!(failure.status(), crate::errors::Status::Refused);
}

#[test]
fn a_baseline_is_read_with_distrust() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("b.json");
    let good = serde_json::to_string(&facts()).unwrap();
    for bad in ["", "{}", "[1, 2", &good.replace("\"check\":1", "\"check\":2"), &good.replace("0.4", "-0.4")] {
        std::fs::write(&path, bad).unwrap();
        assert_eq!(read_baseline(&path).unwrap_err().status(), crate::errors::Status::Refused, "{bad}");
    }
    std::fs::write(&path, good).unwrap();
    assert_eq!(read_baseline(&path).unwrap(), facts());
    assert_eq!(read_baseline(&dir.path().join("none")).unwrap_err().status(), crate::errors::Status::Failed);
}

#[test]
fn shares_are_read_as_people_write_them() {
    assert_eq!(percent("2%"), Ok(2.0));
    assert_eq!(percent("0.5"), Ok(0.5));
    for bad in ["", "%", "-1", "101%", "NaN", "two"] {
        assert!(percent(bad).is_err(), "{bad}");
    }
}
