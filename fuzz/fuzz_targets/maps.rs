//! /proc/PID/maps, in which a program chooses the names.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    for map in dyni_collector::maps::parse(data) {
        assert!(map.range.start <= map.range.end);
    }
});
