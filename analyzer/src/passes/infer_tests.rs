use super::*;
use dyni_schema::Ranges;

#[test]
fn ranges_cover_addresses_and_run_on() {
    let ranges = Ranges { start: vec![10, 10, 20], end: vec![19, 29, 25], count: vec![5, 2, 7] };
    let profile = ModuleProfile { ranges, ..ModuleProfile::default() };
    let e = Evidence::new(&profile, Method::Lbr);
    let covered: Vec<u64> = [9, 10, 19, 20, 25, 26, 29, 30].map(|a| e.covered(LinkAddr(a))).into();
    assert_eq!(covered, [0, 7, 7, 9, 9, 2, 2, 0]);
    assert_eq!(e.run_on(LinkAddr(20)), 2);
    assert_eq!(e.most_covered(LinkAddr(15), LinkAddr(24)), 9);
}
