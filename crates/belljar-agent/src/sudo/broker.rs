//! The agent's end: accepts clients, and gives each a session.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Rlimit;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use super::session::{Sessions, say};
use super::wire::Reply;
use super::{SOCKET, entitlement};
use crate::process::Children;
use crate::users::{LookupError, UserDatabase};

/// Clients at a time. Each has a task, a connection, and the `sudo` that it waits for.
const MAX_SESSIONS: usize = 256;

/// What the agent waits after it could not accept a connection, for lack of memory or descriptors.
const AFTER_FAILURE: Duration = Duration::from_millis(100);

/// Starts `sudo` for those who may. Ends with the runtime.
#[derive(Debug)]
pub(crate) struct Broker {
    sessions: Arc<Sessions>,
    tasks: TaskTracker,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("could not read who may use sudo")]
    Sudoers(#[source] io::Error),
    #[error("could not find the user who may use sudo")]
    User(#[source] LookupError),
    #[error("could not listen on {SOCKET}")]
    Listen(#[source] io::Error),
}

impl Broker {
    /// Listens for the user whom the template entitles. `None` if it entitles nobody.
    pub(crate) fn start(
        children: Children,
        users: UserDatabase,
        open_files: Rlimit,
    ) -> Result<Option<Self>, StartError> {
        let Some(entitled) = entitlement::entitled_user().map_err(StartError::Sudoers)? else { return Ok(None) };
        let user = users.find(&entitled).map_err(StartError::User)?;
        let listener = listen(Path::new(SOCKET), user.gid).map_err(StartError::Listen)?;
        let sessions = Arc::new(Sessions::new(children, users, open_files, entitled));
        let tasks = TaskTracker::new();
        // Not one of the tasks that the end waits for: it has none of its own.
        tokio::spawn(accept(listener, Arc::clone(&sessions), tasks.clone()));
        Ok(Some(Self { sessions, tasks }))
    }

    /// Kills every command and what it started.
    pub(crate) async fn kill_all(&self) {
        self.sessions.ending.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// Makes a socket that root and the group can connect to.
fn listen(path: &Path, group: u32) -> io::Result<UnixListener> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
    // A template may have been made of a sandbox that had one.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    chown(path, Some(0), Some(group))?;
    fs::set_permissions(path, Permissions::from_mode(0o660))?;
    Ok(listener)
}

async fn accept(listener: UnixListener, sessions: Arc<Sessions>, tasks: TaskTracker) {
    let places = Arc::new(Semaphore::new(MAX_SESSIONS));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = sessions.ending.cancelled() => return,
        };
        match accepted {
            Ok((stream, _)) => match Arc::clone(&places).try_acquire_owned() {
                Ok(place) => {
                    let session = Arc::clone(&sessions).attend(stream);
                    tasks.spawn(async move {
                        session.await;
                        drop(place);
                    });
                }
                Err(_) => turn_away(stream).await,
            },
            Err(error) => {
                tracing::warn!(%error, "could not accept a client of sudo");
                tokio::time::sleep(AFTER_FAILURE).await;
            }
        }
    }
}

async fn turn_away(mut stream: UnixStream) {
    // Fits into the new connection's buffer, so that nobody else waits for this.
    say(&mut stream, &Reply::Refused(format!("{MAX_SESSIONS} commands run at a time, and they do already"))).await;
}
