//! The life of a sandbox, as it is persisted.
//!
//! ```text
//!            created                kill, deadline, exit
//! Creating ───────────▶ Running ───────────────────────▶ Ending(reason) ──destroyed──▶ Ended(reason)
//!     │                                                      ▲
//!     └──────────── failed, kill, deadline, exit ────────────┘
//! ```
//!
//! `Ending` is written before the first thing is torn down and `Ended` after the last, so a crash in between leaves a
//! record that says what is still to be done. Whoever acts on a sandbox persists the new state first.

use serde::{Deserialize, Serialize};

/// Where a sandbox is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Promised to nobody yet: its creator has had no answer.
    Creating,
    /// Acknowledged, reachable, with a deadline.
    Running,
    /// Being torn down. It is already gone for its owner.
    Ending(EndReason),
    /// Nothing of it is left but this record.
    Ended(EndReason),
}

/// Why a sandbox ended. Kept for ever in its record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// Its owner killed it.
    Killed,
    /// Its deadline passed.
    DeadlinePassed,
    /// It could not be created.
    CreateFailed,
    /// The server stopped while it was being created, so nobody had been told of it.
    CreateInterrupted,
    /// It ran out of memory and the host ended it.
    OutOfMemory,
    /// It used up the host's processes that it may have, which its engine does not survive.
    OutOfProcesses,
    /// Its engine broke.
    EngineFailed,
    /// It stopped by itself: its init exited, or somebody killed its engine.
    Exited,
    /// The host was restarted under it.
    HostRestarted,
    /// The server was stopped with `--kill-on-exit`.
    ServerStopped,
}

/// What happens to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The agent answered: the sandbox can be handed to its creator.
    Created,
    /// The sandbox has to go.
    End(EndReason),
    /// Everything it held has been freed.
    Destroyed,
}

/// The event is not lawful in this state; a programmer's error, not a user's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{event:?} is not lawful in state {state:?}")]
pub struct UnlawfulTransition {
    pub state: State,
    pub event: Event,
}

impl State {
    /// The state after `event`.
    ///
    /// # Errors
    /// If the event is not lawful in this state.
    pub fn transition(self, event: Event) -> Result<Self, UnlawfulTransition> {
        match (self, event) {
            (Self::Creating, Event::Created) => Ok(Self::Running),
            (Self::Creating | Self::Running, Event::End(reason)) => Ok(Self::Ending(reason)),
            // A second reason doesn't replace the first: what began the end is what the record keeps.
            (Self::Ending(first), Event::End(_)) => Ok(Self::Ending(first)),
            (Self::Ending(reason), Event::Destroyed) => Ok(Self::Ended(reason)),
            (Self::Running | Self::Ending(_) | Self::Ended(_), Event::Created)
            | (Self::Creating | Self::Running | Self::Ended(_), Event::Destroyed)
            | (Self::Ended(_), Event::End(_)) => Err(UnlawfulTransition { state: self, event }),
        }
    }

    /// Whether its owner can still see it.
    #[must_use]
    pub fn is_visible(self) -> bool {
        matches!(self, Self::Running)
    }

    /// Whether anything of it may still exist on the host.
    #[must_use]
    pub fn may_hold_resources(self) -> bool {
        !matches!(self, Self::Ended(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reason() -> impl Strategy<Value = EndReason> {
        prop_oneof![
            Just(EndReason::Killed),
            Just(EndReason::DeadlinePassed),
            Just(EndReason::OutOfMemory),
            Just(EndReason::Exited)
        ]
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![Just(Event::Created), reason().prop_map(Event::End), Just(Event::Destroyed)]
    }

    proptest! {
        /// Whatever happens, in whatever order: the end is final, the first reason stays, and nothing is forgotten
        /// that was never torn down.
        #[test]
        fn the_end_is_final_and_keeps_its_first_reason(events in prop::collection::vec(event(), 0..12)) {
            let mut state = State::Creating;
            let mut first_reason = None;
            for event in events {
                let before = state;
                if let Ok(next) = state.transition(event) {
                    state = next;
                }
                if let State::Ending(reason) = state {
                    first_reason.get_or_insert(reason);
                    prop_assert_eq!(first_reason, Some(reason));
                }
                if let State::Ended(reason) = state {
                    prop_assert_eq!(first_reason, Some(reason));
                }
                if matches!(before, State::Ended(_)) {
                    prop_assert_eq!(before, state);
                }
                if !state.may_hold_resources() {
                    prop_assert!(matches!(before, State::Ending(_) | State::Ended(_)));
                }
            }
        }
    }

    #[test]
    fn a_kill_while_creating_is_lawful() {
        assert_eq!(State::Creating.transition(Event::End(EndReason::Killed)), Ok(State::Ending(EndReason::Killed)));
    }
}
