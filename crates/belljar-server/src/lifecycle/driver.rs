//! The task that owns one sandbox: it alone creates, watches and ends it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use belljar_core::lifecycle::{EndReason, Event, State};
use belljar_runtime::RunningSandbox;
use belljar_store::{SandboxRecord, now_ms};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{Instrument, debug, error, info, warn};

use super::agent::{self, Identity};
use super::manager::{ChangeError, CreateError, Gone, Shared, View, deadline_after};

/// Between two attempts to free what could not be freed; doubles up to the second figure.
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// The wall clock may be set while we sleep, so a far deadline is looked at again this often.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);

/// How long the end of a sandbox waits to be written down first. A database that can't be written must not keep a
/// sandbox alive; a restart finds the record without its sandbox and comes to the same end.
const PERSIST_END_LIMIT: Duration = Duration::from_secs(5);

/// What may be asked of a driver. Each carries the way back for the answer.
#[derive(Debug)]
pub(super) enum Command {
    /// End the sandbox; answered when everything has been freed, or could not be at the first attempt.
    End { reason: EndReason, done: oneshot::Sender<Result<(), Gone>> },
    /// Move the deadline, or only move it further away.
    SetDeadline { deadline_ms: i64, only_extend: bool, done: oneshot::Sender<Result<Arc<SandboxRecord>, ChangeError>> },
}

/// How a driver begins.
#[derive(Debug)]
pub(super) enum Beginning {
    /// Make the sandbox and answer its creator.
    Create(Creation),
    /// It runs already: a restarted server found it again.
    Adopted(Arc<dyn RunningSandbox>),
    /// It has to go: a restarted server found its record, but no sandbox that could be kept.
    End(EndReason),
}

/// What a create needs beyond the record.
#[derive(Debug)]
pub(super) struct Creation {
    pub(super) created: oneshot::Sender<Result<Arc<SandboxRecord>, CreateError>>,
    /// From the moment at which its creator is answered.
    pub(super) timeout: Duration,
    pub(super) user: String,
    pub(super) workdir: String,
}

pub(super) struct Driver {
    shared: Arc<Shared>,
    record: SandboxRecord,
    commands: mpsc::Receiver<Command>,
    view: watch::Sender<View>,
    /// Callers to be answered once the sandbox is gone.
    waiting_for_end: Vec<oneshot::Sender<Result<(), Gone>>>,
}

impl Driver {
    pub(super) fn new(
        shared: Arc<Shared>,
        record: SandboxRecord,
        commands: mpsc::Receiver<Command>,
        view: watch::Sender<View>,
    ) -> Self {
        Self { shared, record, commands, view, waiting_for_end: Vec::new() }
    }

    pub(super) async fn run(self, beginning: Beginning) {
        let span = tracing::info_span!(
            "sandbox",
            sandbox_id = %self.record.id,
            template_id = %self.record.template_id,
            build_id = %self.record.build_id,
        );
        self.live(beginning).instrument(span).await;
    }

    async fn live(mut self, beginning: Beginning) {
        let reason = match beginning {
            Beginning::Create(creation) => match self.create(&creation).await {
                Ok(sandbox) => {
                    // The creator may have hung up; the sandbox then lives until its deadline, as with E2B.
                    let _ = creation.created.send(Ok(Arc::new(self.record.clone())));
                    self.watch(sandbox).await
                }
                Err(failure) => {
                    warn!(error = &failure as &dyn std::error::Error, "the sandbox could not be created");
                    let reason = match &failure {
                        CreateError::Ended(reason) => *reason,
                        _ => EndReason::CreateFailed,
                    };
                    self.end(reason).await;
                    let _ = creation.created.send(Err(failure));
                    return;
                }
            },
            Beginning::Adopted(sandbox) => {
                info!("found again");
                self.show(Some(sandbox.clone()));
                self.watch(sandbox).await
            }
            Beginning::End(reason) => reason,
        };
        self.end(reason).await;
    }

    async fn create(&mut self, creation: &Creation) -> Result<Arc<dyn RunningSandbox>, CreateError> {
        let started = tokio::time::Instant::now();
        let shared = Arc::clone(&self.shared);
        // Held until «running» is written, so that a stopping server can wait for it.
        let _turn = shared.turn_to_start().await?;
        let sandbox = {
            let making = make(&shared, &self.record, creation);
            tokio::pin!(making);
            loop {
                tokio::select! {
                    made = &mut making => break made?,
                    command = self.commands.recv() => match command {
                        Some(Command::End { reason, done }) => {
                            self.waiting_for_end.push(done);
                            return Err(CreateError::Ended(reason));
                        }
                        Some(Command::SetDeadline { done, .. }) => drop(done.send(Err(ChangeError::Gone))),
                        None => unreachable!("the registry holds a sender until the sandbox has ended"),
                    },
                }
            }
        };
        let deadline_ms = deadline_after(creation.timeout);
        shared.store.acknowledge_sandbox(&self.record.id, deadline_ms).await.map_err(CreateError::Store)?;
        self.record.deadline_ms = deadline_ms;
        self.apply(Event::Created);
        self.show(Some(sandbox.clone()));
        info!(elapsed_ms = started.elapsed().as_millis(), "running");
        Ok(sandbox)
    }

    /// Serves a running sandbox until there is a reason to end it.
    async fn watch(&mut self, sandbox: Arc<dyn RunningSandbox>) -> EndReason {
        let exited = sandbox.exited();
        tokio::pin!(exited);
        loop {
            let left = self.record.deadline_ms.saturating_sub(now_ms());
            let Ok(left_ms @ 1..) = u64::try_from(left) else {
                return EndReason::DeadlinePassed;
            };
            let sleep = Duration::from_millis(left_ms).min(LONGEST_SLEEP);
            tokio::select! {
                () = tokio::time::sleep(sleep) => {}
                reason = &mut exited => return reason,
                command = self.commands.recv() => match command {
                    Some(Command::End { reason, done }) => {
                        self.waiting_for_end.push(done);
                        return reason;
                    }
                    Some(Command::SetDeadline { deadline_ms, only_extend, done }) => {
                        let changed = self.set_deadline(deadline_ms, only_extend, &sandbox).await;
                        let _ = done.send(changed.map(|()| Arc::new(self.record.clone())));
                    }
                    None => unreachable!("the registry holds a sender until the sandbox has ended"),
                },
            }
        }
    }

    async fn set_deadline(
        &mut self,
        deadline_ms: i64,
        only_extend: bool,
        sandbox: &Arc<dyn RunningSandbox>,
    ) -> Result<(), ChangeError> {
        if only_extend && deadline_ms <= self.record.deadline_ms {
            return Ok(());
        }
        self.shared.store.set_deadline(&self.record.id, deadline_ms).await?;
        self.record.deadline_ms = deadline_ms;
        self.show(Some(sandbox.clone()));
        Ok(())
    }

    /// Frees everything, however long it takes, and answers whoever waits for it.
    async fn end(&mut self, reason: EndReason) {
        self.apply(Event::End(reason));
        self.show(None);
        self.write_that_it_ends(reason).await;
        let id = self.record.id.clone();
        self.shared.cut_connections(&id).await;
        let mut pause = FIRST_RETRY;
        while let Err(failure) = self.shared.runtime.destroy(&id).await {
            warn!(error = &failure as &dyn std::error::Error, "could not be freed; trying again");
            self.answer_waiting();
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_RETRY);
        }
        // Once more: a request that found the sandbox just before it was hidden may have connected since.
        self.shared.cut_connections(&id).await;
        // Nothing of it is left, so its room is free, whether or not that can be written down.
        self.shared.forget(&id);
        self.apply(Event::Destroyed);
        info!(?reason, "ended");
        self.answer_waiting();
        self.write_that_it_ended(reason).await;
    }

    async fn write_that_it_ends(&self, reason: EndReason) {
        let store = &self.shared.store;
        let writing = async {
            while let Err(failure) = store.begin_end(&self.record.id, reason).await {
                error!(error = &failure as &dyn std::error::Error, "the end could not be written down; trying again");
                tokio::time::sleep(FIRST_RETRY).await;
            }
        };
        if tokio::time::timeout(PERSIST_END_LIMIT, writing).await.is_err() {
            error!("the end could not be written down; the sandbox is ended all the same");
        }
        if matches!(reason, EndReason::CreateFailed | EndReason::CreateInterrupted)
            && let Err(failure) = store.release_idempotency_key(&self.record.id).await
        {
            // Its creator gets a conflict instead of a sandbox, and tries with another key.
            warn!(error = &failure as &dyn std::error::Error, "the idempotency key could not be released");
        }
    }

    async fn write_that_it_ended(&self, reason: EndReason) {
        let mut pause = FIRST_RETRY;
        while let Err(failure) = self.shared.store.finish_end(&self.record.id, reason).await {
            error!(error = &failure as &dyn std::error::Error, "the end could not be written down; trying again");
            // A server that stops leaves it to its next start, which finds a record without a sandbox.
            if self.shared.stopping.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return;
            }
            pause = (pause * 2).min(LONGEST_RETRY);
        }
    }

    /// Those who asked for the end first learn that it happened; whoever came after them, that there is nothing to end.
    fn answer_waiting(&mut self) {
        for done in self.waiting_for_end.drain(..) {
            let _ = done.send(Ok(()));
        }
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::End { done, .. } => drop(done.send(Err(Gone))),
                Command::SetDeadline { done, .. } => drop(done.send(Err(ChangeError::Gone))),
            }
        }
    }

    fn apply(&mut self, event: Event) {
        self.record.state = self.record.state.transition(event).expect("the driver asks only for lawful transitions");
        debug!(state = ?self.record.state, "state");
    }

    fn show(&self, sandbox: Option<Arc<dyn RunningSandbox>>) {
        self.view.send_replace(View { record: Arc::new(self.record.clone()), sandbox });
    }
}

/// Has the sandbox made and its agent told who it is. Dropping this half-way leaves what `destroy` removes.
async fn make(
    shared: &Shared,
    record: &SandboxRecord,
    creation: &Creation,
) -> Result<Arc<dyn RunningSandbox>, CreateError> {
    let limit = shared.settings.create_timeout;
    let making = async {
        let sandbox = shared.runtime.create(&shared.spec_of(record)).await.map_err(CreateError::Runtime)?;
        let env = environment(record);
        let identity = Identity {
            access_token: record.access_token.as_ref(),
            env: &env,
            user: &creation.user,
            workdir: &creation.workdir,
        };
        tokio::select! {
            ready = agent::initialise(sandbox.as_ref(), &identity) => ready.map_err(CreateError::Agent)?,
            reason = sandbox.exited() => return Err(CreateError::Exited(reason)),
        }
        Ok(sandbox)
    };
    tokio::time::timeout(limit, making).await.unwrap_or(Err(CreateError::TooSlow(limit)))
}

/// What every command in the sandbox finds in its environment: what the creator said, and E2B's own variables.
fn environment(record: &SandboxRecord) -> BTreeMap<String, String> {
    let mut env = record.env.clone();
    env.extend([
        ("E2B_SANDBOX".to_owned(), "true".to_owned()),
        ("E2B_SANDBOX_ID".to_owned(), record.id.to_string()),
        ("E2B_TEMPLATE_ID".to_owned(), record.template_id.to_string()),
        ("E2B_TEAM_ID".to_owned(), record.team_id.to_string()),
    ]);
    env
}

/// What a record found after a restart has to begin with, if the sandbox itself is gone.
pub(super) fn beginning_without_sandbox(state: State, host_restarted: bool) -> Beginning {
    match state {
        State::Creating => Beginning::End(EndReason::CreateInterrupted),
        State::Running if host_restarted => Beginning::End(EndReason::HostRestarted),
        State::Running => Beginning::End(EndReason::Exited),
        State::Ending(reason) | State::Ended(reason) => Beginning::End(reason),
    }
}
