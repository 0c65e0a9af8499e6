//! Network namespaces as files, and the threads that step into them.
//!
//! A namespace lives as long as something holds it: here a bind mount of its `ns` file, so that it outlives the server.
//! Being *in* a namespace is a property of a thread. tokio moves tasks between threads, so no task may ever call
//! `setns`: all of it happens on the threads of [`NamespaceWorkers`].

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};
use tokio::sync::{mpsc, oneshot};

use super::error::NetworkError;

/// Not `/proc/self`, which is the process's first thread whichever thread asks.
const OWN_NAMESPACE: &str = "/proc/thread-self/ns/net";

/// A network namespace, held open.
#[derive(Debug)]
pub(super) struct Namespace {
    file: File,
}

impl Namespace {
    /// The calling thread's.
    pub(super) fn current() -> Result<Self, NetworkError> {
        let file = File::open(OWN_NAMESPACE).map_err(|source| NetworkError::File {
            step: "open the network namespace",
            path: OWN_NAMESPACE.into(),
            source,
        })?;
        Ok(Self { file })
    }

    /// Makes a new one, keeps it alive by a mount on `path`, and leaves the calling thread in it.
    ///
    /// The file is created exclusively: two creates of one name can't both succeed.
    pub(super) fn create_at(path: &Path) -> Result<Self, NetworkError> {
        let at = |step| move |source| NetworkError::File { step, path: path.to_owned(), source };
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o400)
            .open(path)
            .map_err(at("create the network namespace file"))?;
        unshare(CloneFlags::CLONE_NEWNET)
            .map_err(|errno| NetworkError::Namespace { step: "unshare the network namespace", source: errno.into() })?;
        mount(Some(OWN_NAMESPACE), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .map_err(|errno| at("mount the network namespace on")(errno.into()))?;
        Self::current()
    }

    /// Opens what [`create_at`](Self::create_at) made. `None` if there is no namespace mounted at `path` (any more).
    pub(super) fn open(path: &Path) -> Result<Option<Self>, NetworkError> {
        let at = |step| move |source| NetworkError::File { step, path: path.to_owned(), source };
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(at("open the network namespace")(error)),
        };
        let filesystem =
            fstatfs(&file).map_err(|errno| at("look at the network namespace file")(errno.into()))?.filesystem_type();
        Ok((filesystem == NSFS_MAGIC).then_some(Self { file }))
    }

    /// Lets go of the namespace at `path`, in whatever state it is.
    pub(super) fn remove_at(path: &Path) -> Result<(), NetworkError> {
        let at = |step| move |source| NetworkError::File { step, path: path.to_owned(), source };
        loop {
            match umount2(path, MntFlags::MNT_DETACH) {
                // Mounts can be stacked; the loop ends at the plain file.
                Ok(()) => {}
                Err(nix::Error::EINVAL | nix::Error::ENOENT) => break,
                Err(errno) => return Err(at("unmount the network namespace")(errno.into())),
            }
        }
        // Unlinking also detaches the copies of the mount that other mount namespaces may have inherited.
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(at("remove the network namespace file")(error))
            }
            _ => Ok(()),
        }
    }

    /// Moves the calling thread into this namespace.
    pub(super) fn enter(&self) -> Result<(), NetworkError> {
        setns(&self.file, CloneFlags::CLONE_NEWNET)
            .map_err(|errno| NetworkError::Namespace { step: "enter a network namespace", source: errno.into() })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// Threads that may step into any network namespace.
///
/// Invariant: every job names the namespace it starts in and the worker enters it first, so it does not matter where
/// the job before it ended, even if it panicked.
pub(super) struct NamespaceWorkers {
    jobs: mpsc::Sender<Job>,
}

impl NamespaceWorkers {
    /// Jobs waiting for a thread; whoever brings one more waits until there is room.
    const QUEUE_LENGTH: usize = 256;

    /// `home` is where idle threads wait: one that stayed in a sandbox's namespace would keep it alive.
    pub(super) fn start(name: &str, threads: usize, home: &Arc<Namespace>) -> Result<Self, NetworkError> {
        let (jobs, receiver) = mpsc::channel::<Job>(Self::QUEUE_LENGTH);
        let receiver = Arc::new(Mutex::new(receiver));
        for number in 0..threads {
            let receiver = Arc::clone(&receiver);
            let home = Arc::clone(home);
            std::thread::Builder::new()
                .name(format!("{name}-{number}"))
                .spawn(move || work(&receiver, &home))
                .map_err(|source| NetworkError::Namespace { step: "start a network worker thread", source })?;
        }
        Ok(Self { jobs })
    }

    /// Runs `job` on a thread that is in `namespace`. The job may move on to others.
    pub(super) async fn run<T, J>(&self, namespace: &Arc<Namespace>, job: J) -> Result<T, NetworkError>
    where
        T: Send + 'static,
        J: FnOnce() -> Result<T, NetworkError> + Send + 'static,
    {
        let namespace = Arc::clone(namespace);
        let (answer, result) = oneshot::channel();
        let job = Box::new(move || {
            // Nobody listens if the caller was cancelled; what the job did is then found by its traces.
            let _ = answer.send(namespace.enter().and_then(|()| job()));
        });
        self.jobs.send(job).await.map_err(|_| NetworkError::WorkerGone)?;
        result.await.map_err(|_| NetworkError::WorkerGone)?
    }
}

impl fmt::Debug for NamespaceWorkers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NamespaceWorkers").finish_non_exhaustive()
    }
}

fn work(receiver: &Mutex<mpsc::Receiver<Job>>, home: &Namespace) {
    loop {
        // One idle thread waits inside the lock, the others for the lock.
        let job = receiver.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
        let Some(job) = job else { return };
        if catch_unwind(AssertUnwindSafe(job)).is_err() {
            tracing::error!("a network job panicked; its caller was told");
        }
        if let Err(error) = home.enter() {
            tracing::warn!(error = %error, "a network worker stays in a sandbox's namespace until its next job");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[tokio::test]
    async fn a_job_that_panics_is_an_error_and_the_worker_lives_on() {
        if !nix::unistd::geteuid().is_root() {
            // Past the test harness, which would keep the line of a test that passes to itself.
            let _ = writeln!(io::stderr(), "SKIPPED: needs root");
            return;
        }
        let home = Arc::new(Namespace::current().expect("own namespace"));
        let workers = NamespaceWorkers::start("test", 1, &home).expect("a thread");
        let panicked: Result<(), _> = workers.run(&home, || panic!("on purpose")).await;
        assert!(matches!(panicked, Err(NetworkError::WorkerGone)));
        assert_eq!(workers.run(&home, || Ok(7)).await.expect("an answer"), 7);
    }

    #[test]
    fn a_plain_file_is_no_namespace() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("plain");
        std::fs::write(&path, "").expect("a file");
        assert!(Namespace::open(&path).expect("readable").is_none());
        assert!(Namespace::open(&directory.path().join("missing")).expect("no error").is_none());
        Namespace::remove_at(&path).expect("removed");
        Namespace::remove_at(&path).expect("removing twice is no error");
        assert!(!path.exists());
    }
}
