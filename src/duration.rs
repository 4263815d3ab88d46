//! Durations on the command line (`10s`, `500ms`, `2m`) and in tables (`1.3 ms`).

use std::time::Duration;

/// Reads `500ms`, `10s`, `2m`, `1h`, also with a fraction (`1.5s`); a bare number means seconds.
///
/// # Errors
/// What is wrong with the text, for clap.
pub fn parse(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let scale = match unit.trim_start() {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" | "" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err("expected a number and ms, s, m or h, as in 500ms, 10s or 2m".into()),
    };
    let value: f64 = number.parse().map_err(|_| "expected a number first, as in 500ms, 10s or 2m".to_owned())?;
    match Duration::try_from_secs_f64(value * scale) {
        Ok(d) if d.is_zero() => Err("must be longer than nothing".into()),
        Ok(d) if d > Duration::from_secs(24 * 3600) => Err("must not be longer than a day".into()),
        Ok(d) => Ok(d),
        Err(e) => Err(e.to_string()),
    }
}

/// Nanoseconds with the unit that leaves one to three digits before the point.
pub fn human_ns(ns: u64) -> String {
    let value = ns as f64;
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..1_000_000 => format!("{:.1} µs", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", value / 1e6),
        _ => format!("{:.1} s", value / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_unit() {
        assert_eq!(parse("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse("10s"), Ok(Duration::from_secs(10)));
        assert_eq!(parse("10"), Ok(Duration::from_secs(10)));
        assert_eq!(parse("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(parse("1h"), Ok(Duration::from_secs(3600)));
    }

    #[test]
    fn refuses_what_is_no_duration() {
        for text in ["", "s", "ten", "10x", "-1s", "0s", "25h", "1.2.3s", "1e9s"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn prints_the_unit_that_fits() {
        assert_eq!(human_ns(999), "999 ns");
        assert_eq!(human_ns(1_300_000), "1.3 ms");
        assert_eq!(human_ns(12_340_000_000), "12.3 s");
    }
}
