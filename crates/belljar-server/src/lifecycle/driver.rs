//! The task that owns one sandbox: it alone creates, watches and ends it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use belljar_core::lifecycle::{EndReason, Event, State};
use belljar_runtime::{RunningSandbox, SandboxSpec};
use belljar_store::{SandboxRecord, now_ms};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{Instrument, debug, error, info, warn};

use super::agent::{self, Identity};
use super::manager::{CreateError, Gone, Shared, View};

/// Between two attempts to free what could not be freed; doubles up to the second figure.
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// The wall clock may be set while we sleep, so a far deadline is looked at again this often.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);

/// What may be asked of a driver. Each carries the way back for the answer.
#[derive(Debug)]
pub(super) enum Command {
    /// End the sandbox; answered when everything has been freed, or could not be at the first attempt.
    End { reason: EndReason, done: oneshot::Sender<Result<(), Gone>> },
    /// Move the deadline, or only move it further away.
    SetDeadline { deadline_ms: i64, only_extend: bool, done: oneshot::Sender<Result<SandboxRecord, Gone>> },
}

/// How a driver begins.
#[derive(Debug)]
pub(super) enum Beginning {
    /// Make the sandbox and answer its creator.
    Create { created: oneshot::Sender<Result<SandboxRecord, CreateError>>, user: String, workdir: String },
    /// It runs already: a restarted server found it again.
    Adopted(Arc<dyn RunningSandbox>),
    /// It has to go: a restarted server found its record, but no sandbox that could be kept.
    End(EndReason),
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
        self.run_inner(beginning).instrument(span).await;
    }

    async fn run_inner(mut self, beginning: Beginning) {
        let reason = match beginning {
            Beginning::Create { created, user, workdir } => match self.create(&user, &workdir).await {
                Ok(sandbox) => {
                    // The creator may have hung up; the sandbox then lives until its deadline, as with E2B.
                    let _ = created.send(Ok(self.record.clone()));
                    self.watch(sandbox).await
                }
                Err(failure) => {
                    warn!(error = &failure as &dyn std::error::Error, "the sandbox could not be created");
                    self.end(EndReason::CreateFailed).await;
                    let _ = created.send(Err(failure));
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

    async fn create(&mut self, user: &str, workdir: &str) -> Result<Arc<dyn RunningSandbox>, CreateError> {
        let started = tokio::time::Instant::now();
        let shared = Arc::clone(&self.shared);
        // Held until «running» is written, so that a stopping server can wait for it.
        let _turn = shared.starts.acquire().await.expect("the semaphore is never closed");
        let limit = shared.settings.create_timeout;
        let made = tokio::time::timeout(limit, async {
            let sandbox = shared.runtime.create(&self.spec()).await.map_err(CreateError::Runtime)?;
            let env = environment(&self.record);
            let identity = Identity { access_token: self.record.access_token.as_ref(), env: &env, user, workdir };
            tokio::select! {
                ready = agent::initialise(sandbox.as_ref(), &identity) => ready.map_err(CreateError::Agent)?,
                reason = sandbox.exited() => return Err(CreateError::Exited(reason)),
            }
            Ok(sandbox)
        })
        .await;
        let sandbox = made.map_err(|_| CreateError::TooSlow(limit))??;
        self.move_to(Event::Created).await.map_err(CreateError::Store)?;
        self.show(Some(sandbox.clone()));
        info!(elapsed_ms = started.elapsed().as_millis(), "running");
        Ok(sandbox)
    }

    /// Serves a running sandbox until there is a reason to end it.
    async fn watch(&mut self, sandbox: Arc<dyn RunningSandbox>) -> EndReason {
        loop {
            let left = self.record.deadline_ms.saturating_sub(now_ms());
            let Ok(left_ms @ 1..) = u64::try_from(left) else {
                return EndReason::DeadlinePassed;
            };
            let sleep = Duration::from_millis(left_ms).min(LONGEST_SLEEP);
            tokio::select! {
                () = tokio::time::sleep(sleep) => {}
                reason = sandbox.exited() => return reason,
                command = self.commands.recv() => match command {
                    Some(Command::End { reason, done }) => {
                        self.waiting_for_end.push(done);
                        return reason;
                    }
                    Some(Command::SetDeadline { deadline_ms, only_extend, done }) => {
                        self.set_deadline(deadline_ms, only_extend, &sandbox).await;
                        let _ = done.send(Ok(self.record.clone()));
                    }
                    None => unreachable!("the registry holds a sender until the sandbox has ended"),
                },
            }
        }
    }

    async fn set_deadline(&mut self, deadline_ms: i64, only_extend: bool, sandbox: &Arc<dyn RunningSandbox>) {
        if only_extend && deadline_ms <= self.record.deadline_ms {
            return;
        }
        if let Err(failure) = self.shared.store.set_deadline(&self.record.id, deadline_ms).await {
            // The new deadline counts while this process lives; after a crash the old one would.
            error!(error = &failure as &dyn std::error::Error, "the new deadline could not be written down");
        }
        self.record.deadline_ms = deadline_ms;
        self.show(Some(sandbox.clone()));
    }

    /// Frees everything, however long it takes, and answers whoever waits for it.
    async fn end(&mut self, reason: EndReason) {
        self.persist_until_done(Event::End(reason)).await;
        self.show(None);
        let mut pause = FIRST_RETRY;
        while let Err(failure) = self.shared.runtime.destroy(&self.record.id).await {
            warn!(error = &failure as &dyn std::error::Error, "could not be freed; trying again");
            self.answer_waiting();
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_RETRY);
        }
        self.persist_until_done(Event::Destroyed).await;
        self.shared.forget(&self.record.id);
        info!(?reason, "ended");
        self.answer_waiting();
    }

    /// Those who asked for the end first learn that it happened; whoever came after them, that there is nothing to end.
    fn answer_waiting(&mut self) {
        for done in self.waiting_for_end.drain(..) {
            let _ = done.send(Ok(()));
        }
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::End { done, .. } => drop(done.send(Err(Gone))),
                Command::SetDeadline { done, .. } => drop(done.send(Err(Gone))),
            }
        }
    }

    async fn persist_until_done(&mut self, event: Event) {
        let mut pause = FIRST_RETRY;
        while let Err(failure) = self.move_to(event).await {
            error!(error = &failure as &dyn std::error::Error, ?event, "could not be written down; trying again");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_RETRY);
        }
    }

    async fn move_to(&mut self, event: Event) -> Result<(), belljar_store::StoreError> {
        let from = self.record.state;
        let to = from.transition(event).expect("the driver asks only for lawful transitions");
        if from != to {
            self.shared.store.move_sandbox(&self.record.id, from, to).await?;
            self.record.state = to;
            debug!(?to, "state written");
        }
        Ok(())
    }

    fn show(&self, sandbox: Option<Arc<dyn RunningSandbox>>) {
        self.view.send_replace(View { record: self.record.clone(), sandbox });
    }

    fn spec(&self) -> SandboxSpec {
        self.shared.spec_of(&self.record)
    }
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
