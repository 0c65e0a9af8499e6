//! Why a sandbox ended, as far as the host can tell. The sentry is nobody's child once the server was restarted, so
//! there is no exit status to ask for; what it leaves behind has to do.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::cgroup::Usage;

/// Why a sandbox ended by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// It had used up its memory, and the kernel ended it.
    OutOfMemory,
    /// It had used up the host's processes that it may have. The sentry does not survive that.
    OutOfProcesses,
    /// The sentry broke; its first words on that.
    EngineFailure { message: String },
    /// Its init ended, or somebody killed the sentry.
    Ended,
}

/// Longest part of the sentry's last words that is kept.
const LONGEST_MESSAGE_BYTES: u64 = 300;

pub(super) fn reason(usage: Option<Usage>, panic_log: &Path) -> ExitReason {
    if usage.is_some_and(|usage| usage.out_of_memory_kills > 0) {
        return ExitReason::OutOfMemory;
    }
    let last_words = last_words(panic_log);
    match (last_words, usage) {
        (Some(_), Some(usage)) if usage.process_limit_hits > 0 => ExitReason::OutOfProcesses,
        (Some(message), _) => ExitReason::EngineFailure { message },
        (None, _) => ExitReason::Ended,
    }
}

/// The first line of the sentry's panic log, if it wrote any. A guest can provoke what is in it, so little of it is
/// read.
fn last_words(panic_log: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(panic_log).ok()?.take(LONGEST_MESSAGE_BYTES).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    text.lines().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn usage(out_of_memory_kills: u64, process_limit_hits: u64) -> Option<Usage> {
        Some(Usage { cpu_time: Duration::ZERO, memory_bytes: 0, out_of_memory_kills, process_limit_hits })
    }

    #[test]
    fn the_kernels_counters_come_before_the_sentrys_words() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let log = directory.path().join("panic.log");
        assert_eq!(reason(usage(0, 0), &log), ExitReason::Ended);
        assert_eq!(reason(usage(0, 3), &log), ExitReason::Ended, "the limit was met, but survived");
        std::fs::write(&log, "\npanic: oops\ngoroutine 1\n").expect("written");
        assert_eq!(reason(usage(0, 0), &log), ExitReason::EngineFailure { message: "panic: oops".to_owned() });
        assert_eq!(reason(None, &log), ExitReason::EngineFailure { message: "panic: oops".to_owned() });
        assert_eq!(reason(usage(0, 3), &log), ExitReason::OutOfProcesses);
        assert_eq!(reason(usage(1, 3), &log), ExitReason::OutOfMemory);
    }
}
