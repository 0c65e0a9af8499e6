//! How a process ended, in the words of envd (which are those of Go's `os.ProcessState`).

use std::fmt;

use belljar_protocol::envd::process::process_event::EndEvent;
use rustix::process::WaitStatus;

/// The exit code reported for a process that a signal ended.
const NO_EXIT_CODE: i32 = -1;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    Code(i32),
    Signal { number: i32, core_dumped: bool },
}

impl Exit {
    /// `None` for a process that only stopped or continued.
    pub(crate) fn from_wait_status(status: WaitStatus) -> Option<Self> {
        const CORE_DUMPED: i32 = 0x80;
        if let Some(code) = status.exit_status() {
            return Some(Self::Code(code));
        }
        let number = status.terminating_signal()?;
        Some(Self::Signal { number, core_dumped: status.as_raw() & CORE_DUMPED != 0 })
    }

    pub(crate) fn is_success(self) -> bool {
        self == Self::Code(0)
    }

    pub(crate) fn to_event(self) -> EndEvent {
        let status = self.to_string();
        EndEvent {
            exit_code: match self {
                Self::Code(code) => code,
                Self::Signal { .. } => NO_EXIT_CODE,
            },
            exited: matches!(self, Self::Code(_)),
            error: (!self.is_success()).then(|| status.clone()),
            status,
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Code(code) => write!(f, "exit status {code}"),
            Self::Signal { number, core_dumped } => {
                f.write_str("signal: ")?;
                match signal_description(number) {
                    Some(description) => f.write_str(description)?,
                    None => write!(f, "signal {number}")?,
                }
                f.write_str(if core_dumped { " (core dumped)" } else { "" })
            }
        }
    }
}

/// Linux's signals by number, on every architecture belljar runs on.
fn signal_description(number: i32) -> Option<&'static str> {
    Some(match number {
        1 => "hangup",
        2 => "interrupt",
        3 => "quit",
        4 => "illegal instruction",
        5 => "trace/breakpoint trap",
        6 => "aborted",
        7 => "bus error",
        8 => "floating point exception",
        9 => "killed",
        10 => "user defined signal 1",
        11 => "segmentation fault",
        12 => "user defined signal 2",
        13 => "broken pipe",
        14 => "alarm clock",
        15 => "terminated",
        16 => "stack fault",
        24 => "CPU time limit exceeded",
        25 => "file size limit exceeded",
        26 => "virtual timer expired",
        27 => "profiling timer expired",
        29 => "I/O possible",
        30 => "power failure",
        31 => "bad system call",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(exit: Exit) -> (i32, bool, String, Option<String>) {
        let event = exit.to_event();
        (event.exit_code, event.exited, event.status, event.error)
    }

    #[test]
    fn success_has_no_error() {
        assert_eq!(event(Exit::Code(0)), (0, true, "exit status 0".into(), None));
    }

    #[test]
    fn failure_repeats_its_status_as_the_error() {
        assert_eq!(event(Exit::Code(3)), (3, true, "exit status 3".into(), Some("exit status 3".into())));
    }

    #[test]
    fn signals_have_names_and_no_exit_code() {
        for (number, core_dumped, status) in
            [(9, false, "signal: killed"), (6, true, "signal: aborted (core dumped)"), (40, false, "signal: signal 40")]
        {
            let expected = (-1, false, status.to_owned(), Some(status.to_owned()));
            assert_eq!(event(Exit::Signal { number, core_dumped }), expected);
        }
    }
}
