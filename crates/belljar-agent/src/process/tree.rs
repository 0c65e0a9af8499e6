//! Killing a command with everything it started.
//!
//! Every command leads its own session, so its session and process group find its children even when their parents
//! are gone; children that moved to a session of their own are found by their parents, as long as those live.

use std::collections::HashSet;
use std::time::Duration;
use std::{fs, thread};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// A tree that still grows after this many sweeps is out-forking us; the sandbox's process limit is what holds it.
const MAX_SWEEPS: usize = 16;

/// What the killed get to disappear before the next sweep.
const BETWEEN_SWEEPS: Duration = Duration::from_millis(2);

/// Kills `leader`'s whole tree. Returns once nothing of it runs, or after [`MAX_SWEEPS`].
pub(super) fn kill(leader: Pid) {
    for _ in 0..MAX_SWEEPS {
        // Found before the first of them dies: then their children would be orphans without a trace.
        let members = members(leader.as_raw_nonzero().get(), &scan());
        // No such process, or no longer: what was to be achieved.
        let _ = kill_process_group(leader, Signal::KILL);
        if members.is_empty() {
            return;
        }
        for pid in members.into_iter().filter_map(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
        thread::sleep(BETWEEN_SWEEPS);
    }
}

/// Whom of a command a signal is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Whom {
    Leader,
    /// The leader's process group without the leader; the leader if it is alone.
    Followers,
    /// The leader and everything it started.
    Everyone,
}

/// Sends a signal to those who are there at the moment.
pub(super) fn signal(leader: Pid, whom: Whom, signal: Signal) {
    let number = leader.as_raw_nonzero().get();
    let recipients = match whom {
        Whom::Leader => vec![number],
        Whom::Followers => followers(number, &scan()),
        Whom::Everyone => {
            // A leader may notice that a child is stopped, and stop as well: nobody is to continue it too early.
            let mut members = members(number, &scan());
            members.sort_by_key(|pid| (*pid == number) == (signal == Signal::CONT));
            members
        }
    };
    for pid in recipients.into_iter().filter_map(Pid::from_raw) {
        // Ended in the meantime, then.
        let _ = kill_process(pid, signal);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    pid: i32,
    parent: i32,
    group: i32,
    session: i32,
}

/// Every running process; zombies are left out.
fn scan() -> Vec<Entry> {
    let Ok(directory) = fs::read_dir("/proc") else { return Vec::new() };
    directory
        .flatten()
        .filter(|entry| entry.file_name().as_encoded_bytes().first().is_some_and(u8::is_ascii_digit))
        .filter_map(|entry| parse(&fs::read_to_string(entry.path().join("stat")).ok()?))
        .collect()
}

/// `pid (name) state parent group session …`, where the name may contain anything.
fn parse(stat: &str) -> Option<Entry> {
    let (pid, rest) = stat.split_once(" (")?;
    let (_name, rest) = rest.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    Some(Entry {
        pid: pid.parse().ok()?,
        parent: fields.next()?.parse().ok()?,
        group: fields.next()?.parse().ok()?,
        session: fields.next()?.parse().ok()?,
    })
}

fn followers(leader: i32, all: &[Entry]) -> Vec<i32> {
    let found: Vec<i32> =
        all.iter().filter(|entry| entry.group == leader && entry.pid != leader).map(|entry| entry.pid).collect();
    if found.is_empty() { vec![leader] } else { found }
}

/// The leader, its session and group, and the descendants of any of them.
fn members(leader: i32, all: &[Entry]) -> Vec<i32> {
    let belongs = |entry: &Entry| entry.pid == leader || entry.session == leader || entry.group == leader;
    let mut found: HashSet<i32> = all.iter().filter(|entry| belongs(entry)).map(|entry| entry.pid).collect();
    loop {
        let children: Vec<i32> = all
            .iter()
            .filter(|entry| found.contains(&entry.parent) && !found.contains(&entry.pid))
            .map(|entry| entry.pid)
            .collect();
        if children.is_empty() {
            return found.into_iter().collect();
        }
        found.extend(children);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn entry(pid: i32, parent: i32, group: i32, session: i32) -> Entry {
        Entry { pid, parent, group, session }
    }

    #[test]
    fn finds_orphans_by_session_and_escaped_sessions_by_parent() {
        let all = [
            entry(1, 0, 1, 1),
            entry(10, 1, 10, 10),
            entry(11, 10, 11, 10),
            entry(12, 1, 12, 10),
            entry(13, 11, 13, 13),
            entry(14, 13, 13, 13),
            entry(20, 1, 20, 20),
            entry(21, 20, 20, 20),
        ];
        let mut members = members(10, &all);
        members.sort_unstable();
        assert_eq!(members, [10, 11, 12, 13, 14]);
    }

    #[test]
    fn a_leader_without_followers_is_its_own() {
        let all = [entry(10, 1, 10, 10), entry(11, 10, 10, 10), entry(12, 10, 12, 10), entry(20, 1, 20, 20)];
        assert_eq!(followers(10, &all), [11]);
        assert_eq!(followers(20, &all), [20]);
    }

    #[test]
    fn a_process_can_call_itself_anything() {
        let parsed = parse("42 (a) R 1 1 1 (b)) S 7 8 9 0 -1 4194560");
        assert_eq!(parsed, Some(entry(42, 7, 8, 9)));
        assert_eq!(parse("42 (sh) Z 7 8 9 0"), None);
        assert_eq!(parse("42 (sh"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn the_scan_sees_this_test() {
        let me = i32::try_from(std::process::id()).expect("a pid");
        assert!(scan().iter().any(|entry| entry.pid == me));
    }
}
