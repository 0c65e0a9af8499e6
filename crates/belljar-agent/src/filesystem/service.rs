//! The Connect service `filesystem.Filesystem`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{fs, io};

use belljar_protocol::envd::filesystem::{
    CreateWatcherRequest, CreateWatcherResponse, EntryInfo, Filesystem as Api, GetWatcherEventsRequest,
    GetWatcherEventsResponse, ListDirRequest, ListDirResponse, MakeDirRequest, MakeDirResponse, MoveRequest,
    MoveResponse, RemoveRequest, RemoveResponse, RemoveWatcherRequest, RemoveWatcherResponse, StatRequest,
    StatResponse, WatchDirRequest, WatchDirResponse,
};
use connectrpc::{ConnectError, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream};

use super::error::FilesystemError;
use super::{directories, entry, list};
use crate::connect_errors;
use crate::process::Children;
use crate::state::Sandbox;
use crate::users::User;

/// Everything `filesystem.Filesystem` needs; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct FilesystemService {
    sandbox: Sandbox,
    children: Children,
}

impl FilesystemService {
    pub(crate) fn new(sandbox: Sandbox, children: Children) -> Self {
        Self { sandbox, children }
    }

    /// The request's user and what `path` means for it.
    fn resolve(&self, context: &RequestContext, path: &str) -> Result<(User, PathBuf), ConnectError> {
        let user = self.sandbox.user_of(context.headers()).map_err(connect_errors::user)?;
        let path = self.sandbox.resolve(path, &user).map_err(connect_errors::path)?;
        Ok((user, path))
    }

    async fn describe(&self, path: PathBuf) -> Result<EntryInfo, ConnectError> {
        let users = self.sandbox.users.clone();
        blocking(move || entry::describe(&path, &users.names())).await
    }

    /// A rename between file systems, as from `/tmp` to a home directory, is a copy, which `mv` knows how to make.
    async fn move_across(&self, source: &Path, destination: &Path) -> Result<(), FilesystemError> {
        let failed = FilesystemError::io("moving", source);
        let mut command = Command::new("mv");
        command.arg("-T").arg("--").args([source, destination]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let moved = match self.children.spawn(command).await {
            Ok(spawned) => spawned.exit.await.map_err(io::Error::other),
            Err(error) => Err(error),
        };
        match moved {
            Ok(exit) if exit.is_success() => Ok(()),
            Ok(exit) => Err(failed(io::Error::other(format!("mv: {exit}")))),
            Err(error) => Err(failed(error)),
        }
    }
}

/// Runs `operation` where it may block.
async fn blocking<T: Send + 'static>(
    operation: impl FnOnce() -> Result<T, FilesystemError> + Send + 'static,
) -> Result<T, ConnectError> {
    let finished = tokio::task::spawn_blocking(operation).await;
    Ok(finished.map_err(|error| ConnectError::internal(error.to_string()))??)
}

// Concrete return types say more than the trait's `impl Encodable`, and nobody outside this crate sees them.
#[expect(refining_impl_trait)]
impl Api for FilesystemService {
    async fn stat(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, StatRequest>,
    ) -> ServiceResult<StatResponse> {
        let (_user, path) = self.resolve(&context, request.path)?;
        let entry = self.describe(path).await?;
        Response::ok(StatResponse { entry: entry.into() })
    }

    async fn make_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, MakeDirRequest>,
    ) -> ServiceResult<MakeDirResponse> {
        let (user, path) = self.resolve(&context, request.path)?;
        let created = path.clone();
        blocking(move || make_directory(&path, &user)).await?;
        let entry = self.describe(created).await?;
        Response::ok(MakeDirResponse { entry: entry.into() })
    }

    async fn r#move(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, MoveRequest>,
    ) -> ServiceResult<MoveResponse> {
        let (user, source) = self.resolve(&context, request.source)?;
        let (_, destination) = self.resolve(&context, request.destination)?;
        let (from, to) = (source.clone(), destination.clone());
        let renamed = blocking(move || rename(&from, &to, &user)).await?;
        if renamed == Renamed::NeedsCopy {
            self.move_across(&source, &destination).await?;
        }
        let entry = self.describe(destination).await?;
        Response::ok(MoveResponse { entry: entry.into() })
    }

    async fn list_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, ListDirRequest>,
    ) -> ServiceResult<ListDirResponse> {
        let (_user, path) = self.resolve(&context, request.path)?;
        let depth = request.depth;
        let users = self.sandbox.users.clone();
        let entries = blocking(move || list::list(&path, depth, &users.names())).await?;
        Response::ok(ListDirResponse { entries })
    }

    async fn remove(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, RemoveRequest>,
    ) -> ServiceResult<RemoveResponse> {
        let (_user, path) = self.resolve(&context, request.path)?;
        blocking(move || remove(&path)).await?;
        Response::ok(RemoveResponse::default())
    }

    async fn watch_dir(
        &self,
        _context: RequestContext,
        _request: ServiceRequest<'_, WatchDirRequest>,
    ) -> ServiceResult<ServiceStream<WatchDirResponse>> {
        Err(watching_is_not_served())
    }

    async fn create_watcher(
        &self,
        _context: RequestContext,
        _request: ServiceRequest<'_, CreateWatcherRequest>,
    ) -> ServiceResult<CreateWatcherResponse> {
        Err(watching_is_not_served())
    }

    async fn get_watcher_events(
        &self,
        _context: RequestContext,
        _request: ServiceRequest<'_, GetWatcherEventsRequest>,
    ) -> ServiceResult<GetWatcherEventsResponse> {
        Err(watching_is_not_served())
    }

    async fn remove_watcher(
        &self,
        _context: RequestContext,
        _request: ServiceRequest<'_, RemoveWatcherRequest>,
    ) -> ServiceResult<RemoveWatcherResponse> {
        Err(watching_is_not_served())
    }
}

fn watching_is_not_served() -> ConnectError {
    ConnectError::unimplemented("watching directories is not served yet")
}

fn make_directory(path: &Path, owner: &User) -> Result<(), FilesystemError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Err(FilesystemError::AlreadyExists(path.to_owned())),
        Ok(_) => Err(FilesystemError::Occupied(path.to_owned())),
        // Whatever is wrong with it, creating it says so.
        Err(_) => directories::ensure(path, owner),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Renamed {
    Yes,
    NeedsCopy,
}

fn rename(source: &Path, destination: &Path, owner: &User) -> Result<Renamed, FilesystemError> {
    // Asked first, so that a source that isn't there leaves no directories behind.
    fs::symlink_metadata(source).map_err(FilesystemError::or_not_found("source file", "getting info of", source))?;
    if let Some(parent) = destination.parent() {
        directories::ensure(parent, owner)?;
    }
    match fs::rename(source, destination) {
        Ok(()) => Ok(Renamed::Yes),
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => Ok(Renamed::NeedsCopy),
        Err(error) => Err(FilesystemError::or_not_found("source file", "renaming", source)(error)),
    }
}

/// Removes what is at `path` with all in it. What isn't there counts as removed.
fn remove(path: &Path) -> Result<(), FilesystemError> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(FilesystemError::io("removing", path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn removing_takes_links_and_not_what_they_lead_to() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (kept, link) = (directory.path().join("kept"), directory.path().join("link"));
        fs::create_dir_all(kept.join("inside")).expect("created");
        symlink(&kept, &link).expect("linked");
        remove(&link).expect("removed");
        assert!(kept.join("inside").exists() && !link.exists());
        remove(&kept).expect("removed");
        assert!(!kept.exists());
        remove(&kept).expect("nothing to remove is fine");
    }
}
