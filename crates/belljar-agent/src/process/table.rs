//! The processes a request can name.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use belljar_protocol::envd::process::ProcessConfig;
use belljar_protocol::envd::process::process_selector::Selector;
use rustix::process::Pid;
use tokio_util::sync::CancellationToken;

use super::output::OutputLog;
use super::stdin::Stdin;

/// How long an ended process can still be connected to.
pub(crate) const RETENTION: Duration = Duration::from_secs(30);

/// How many ended processes are remembered at most, each with what nobody read of its output.
const MAX_ENDED: usize = 64;

/// A command that was started through the agent.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: Pid,
    pub(crate) tag: Option<String>,
    /// As it was asked for; what the defaults added is not in it.
    pub(crate) config: ProcessConfig,
    pub(crate) output: Arc<OutputLog>,
    pub(crate) stdin: Stdin,
    /// Set when a client killed it: then nothing it left behind holds back its end.
    pub(crate) killed: CancellationToken,
}

impl Process {
    pub(crate) fn wire_pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FindError {
    #[error("process with pid {0} not found")]
    NoSuchPid(u32),
    #[error("process with tag {0} not found")]
    NoSuchTag(String),
    #[error("no process selected: neither pid nor tag given")]
    NothingSelected,
}

#[derive(Debug, Default)]
pub(crate) struct Table {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    processes: HashMap<u32, Arc<Process>>,
    /// Oldest first.
    ended: VecDeque<Arc<Process>>,
}

impl Table {
    pub(crate) fn insert(&self, process: Arc<Process>) {
        let mut state = self.state();
        // What this one is called is no longer the name of one that ended.
        let renamed = |ended: &Process| {
            ended.output.has_ended() && (ended.pid == process.pid || (ended.tag.is_some() && ended.tag == process.tag))
        };
        state.processes.retain(|_, ended| !renamed(ended));
        state.ended.retain(|ended| !renamed(ended));
        state.processes.insert(process.wire_pid(), process);
    }

    /// Those that have not ended, by pid.
    pub(crate) fn running(&self) -> Vec<Arc<Process>> {
        let mut running: Vec<_> =
            self.state().processes.values().filter(|process| !process.output.has_ended()).cloned().collect();
        running.sort_by_key(|process| process.wire_pid());
        running
    }

    /// The selected process, ended or not.
    pub(crate) fn find(&self, selector: Option<&Selector>) -> Result<Arc<Process>, FindError> {
        let state = self.state();
        match selector.ok_or(FindError::NothingSelected)? {
            Selector::Pid(pid) => state.processes.get(pid).cloned().ok_or(FindError::NoSuchPid(*pid)),
            Selector::Tag(tag) => state
                .processes
                .values()
                .find(|process| process.tag.as_ref() == Some(tag))
                .cloned()
                .ok_or_else(|| FindError::NoSuchTag(tag.clone())),
        }
    }

    /// The selected process, if it has not ended.
    pub(crate) fn find_running(&self, selector: Option<&Selector>) -> Result<Arc<Process>, FindError> {
        let process = self.find(selector)?;
        if !process.output.has_ended() {
            return Ok(process);
        }
        Err(match selector {
            Some(Selector::Tag(tag)) => FindError::NoSuchTag(tag.clone()),
            Some(Selector::Pid(_)) | None => FindError::NoSuchPid(process.wire_pid()),
        })
    }

    /// Notes that a process has ended, and forgets the one that ended first if there are too many.
    pub(crate) fn retire(&self, process: &Arc<Process>) {
        let mut state = self.state();
        state.ended.push_back(Arc::clone(process));
        if state.ended.len() > MAX_ENDED
            && let Some(oldest) = state.ended.pop_front()
        {
            state.forget(&oldest);
        }
    }

    pub(crate) fn forget(&self, process: &Arc<Process>) {
        let mut state = self.state();
        state.ended.retain(|ended| !Arc::ptr_eq(ended, process));
        state.forget(process);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Its pid may be another's by now.
    fn forget(&mut self, process: &Arc<Process>) {
        let pid = process.wire_pid();
        if self.processes.get(&pid).is_some_and(|found| Arc::ptr_eq(found, process)) {
            self.processes.remove(&pid);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::exit::Exit;
    use super::*;

    fn process(pid: i32, tag: Option<&str>) -> Arc<Process> {
        Arc::new(Process {
            pid: Pid::from_raw(pid).expect("not zero"),
            tag: tag.map(str::to_owned),
            config: ProcessConfig::default(),
            output: Arc::default(),
            stdin: Stdin::disabled(),
            killed: CancellationToken::new(),
        })
    }

    #[test]
    fn processes_are_found_by_pid_and_by_tag() {
        let table = Table::default();
        table.insert(process(7, Some("server")));
        table.insert(process(5, None));
        assert_eq!(table.find(Some(&Selector::Tag("server".into()))).expect("found").wire_pid(), 7);
        assert_eq!(table.find(Some(&Selector::Pid(5))).expect("found").wire_pid(), 5);
        assert_eq!(table.find(Some(&Selector::Pid(6))).err(), Some(FindError::NoSuchPid(6)));
        assert_eq!(table.find(None).err(), Some(FindError::NothingSelected));
        assert_eq!(table.running().iter().map(|process| process.wire_pid()).collect::<Vec<_>>(), [5, 7]);
    }

    #[test]
    fn ended_processes_can_be_connected_to_and_nothing_else() {
        let table = Table::default();
        let ended = process(7, Some("job"));
        table.insert(Arc::clone(&ended));
        ended.output.end(Exit::Code(0));
        table.retire(&ended);
        let by_tag = Selector::Tag("job".into());
        assert!(table.find(Some(&by_tag)).is_ok());
        assert_eq!(table.find_running(Some(&by_tag)).err(), Some(FindError::NoSuchTag("job".into())));
        assert!(table.running().is_empty());
        table.forget(&ended);
        assert!(table.find(Some(&by_tag)).is_err());
    }

    #[test]
    fn a_name_that_is_taken_again_means_the_new_process() {
        let table = Table::default();
        let (old, new) = (process(7, Some("job")), process(8, Some("job")));
        table.insert(Arc::clone(&old));
        old.output.end(Exit::Code(1));
        table.retire(&old);
        table.insert(Arc::clone(&new));
        assert_eq!(table.find(Some(&Selector::Tag("job".into()))).expect("found").wire_pid(), 8);
        assert!(table.find(Some(&Selector::Pid(7))).is_err());
        let reused = process(8, None);
        new.output.end(Exit::Code(1));
        table.insert(Arc::clone(&reused));
        table.forget(&new);
        assert!(table.find(Some(&Selector::Pid(8))).is_ok());
    }

    #[test]
    fn the_memory_of_ended_processes_is_bounded() {
        let table = Table::default();
        for pid in 1..=200 {
            let ended = process(pid, None);
            table.insert(Arc::clone(&ended));
            ended.output.end(Exit::Code(0));
            table.retire(&ended);
        }
        let state = table.state();
        assert_eq!((state.processes.len(), state.ended.len()), (MAX_ENDED, MAX_ENDED));
        assert!(state.processes.contains_key(&200));
    }
}
