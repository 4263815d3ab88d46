//! What the next daemon has to know: programs that are to be left alone, in a file beside the socket.

use std::collections::HashMap;

use super::machine::{Id, Machine};

/// What is kept beside the socket: a program a line, and why it is to be left alone.
pub fn text(machine: &Machine) -> String {
    let line = |(id, why): (&Id, &str)| {
        format!("{} {} {} {} {}\n", id.pid, id.start_ticks, id.layout.0, id.layout.1, why.replace('\n', " "))
    };
    machine.held().map(line).collect()
}

/// What [`text`] has written; lines that make no sense are passed over.
pub fn read(text: &str) -> HashMap<Id, String> {
    let line = |line: &str| {
        let mut words = line.splitn(5, ' ');
        let pid = words.next()?.parse().ok()?;
        let mut number = || words.next()?.parse::<u64>().ok();
        let id = Id { pid, start_ticks: number()?, layout: (number()?, number()?) };
        Some((id, words.next()?.to_owned()))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::super::machine::{Found, Rules, Sighting};
    use super::*;
    use crate::config::Limit;
    use std::time::Duration;

    #[test]
    fn what_is_held_is_read_again() {
        let limit = Limit { window: Duration::ZERO, delay: Duration::ZERO, cpu_usage: 0.0 };
        let id = Id { pid: 7, start_ticks: 99, layout: (0x5555_0000, 0x7fff_0000) };
        let seen =
            Sighting { id, name: "x".into(), uid: 0, processes: 1, age: Duration::ZERO, cpu_percent: None, limit };
        let rules = Rules { n_programs: 1, reoptimize: false, watch_every: Duration::from_secs(1) };
        let mut machine = Machine::new(rules);
        machine.seen(Duration::ZERO, vec![seen], |_| (Found::Nothing, Some("undone by user 5".into())));
        let kept = text(&machine);
        assert_eq!(read(&kept), HashMap::from([(id, "undone by user 5".to_owned())]));
        assert!(read("7 99 1\nx y z\n\n").is_empty());
    }
}
