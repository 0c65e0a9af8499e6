//! Builds the root filesystem of a template from Debian packages, on the spot, with `mmdebstrap`.
//!
//! ```text
//! template.toml ──Recipe──┐                         <dest>.partial/            <dest>/
//! [template_build] ─Options┼─> supervised mmdebstrap ─> rootfs/ ──finish──rename─> rootfs/
//! host's CA certificates ─┘    (own PID and mount      inputs/                    build.json
//!                               namespace)
//! ```
//!
//! Why mmdebstrap and not debootstrap: it lets apt resolve, so that updates and security fixes are in the first and
//! only installation and a dependency of any kind is understood; it takes several sources at once; dpkg options such as
//! "leave the manuals out" hold from the first package on; and it is several times faster. It knows the merged `/usr`
//! of current Debian without a second pass.
//!
//! What a build may leave behind when it is killed, at whatever moment and with whatever signal: the directory
//! `<dest>.partial`, and nothing else. All mounts live in a mount namespace and all processes in a PID namespace that
//! end with the builder (`supervisor`), and `<dest>` appears by one rename (`staging`). The next build of the same
//! destination and [`remove_abandoned`] clear the rest away.

mod certificates;
mod diagnosis;
mod finish;
mod metadata;
mod mirror;
mod mmdebstrap;
mod progress;
mod recipe;
mod staging;
mod supervisor;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use certificates::CertificateError;
pub use metadata::{BuildMetadata, BuiltUser, MetadataError};
pub use mirror::{Mirror, MirrorError};
pub use progress::{Progress, Step};
pub use recipe::{Recipe, RecipeError, User, Variant};
pub use staging::remove_abandoned;

use certificates::HostCertificates;
use staging::Staging;

/// What the operator decides about a build, as opposed to what the recipe says.
#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// Where packages come from.
    pub mirror: Mirror,
    /// Where security updates come from; without it the address is derived from `mirror` (see [`Mirror::security`]).
    pub security_mirror: Option<Mirror>,
    /// PEM files on this host whose certificates the new system shall trust too. Empty means: exactly Debian's.
    pub host_ca_certificates: Vec<PathBuf>,
    /// Options for apt during the build, as `Key=value` or as a line of apt.conf. They do not stay in the new system.
    pub apt_options: Vec<String>,
    /// The build is stopped when it takes longer.
    pub timeout: Duration,
}

impl Default for BuildOptions {
    fn default() -> Self {
        Self {
            mirror: Mirror::default(),
            security_mirror: None,
            host_ca_certificates: Vec::new(),
            apt_options: Vec::new(),
            timeout: Duration::from_secs(30 * 60),
        }
    }
}

impl BuildOptions {
    /// What [`BuildMetadata::host_ca_digest`] of a build with these options is: a template whose digest differs trusts
    /// other certificates than the operator now asks for.
    ///
    /// # Errors
    /// When a file of `host_ca_certificates` cannot be used.
    pub fn host_ca_digest(&self) -> Result<Option<String>, CertificateError> {
        Ok(HostCertificates::read(&self.host_ca_certificates)?.digest())
    }
}

/// Why a template could not be built. The text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error(
        "building a template needs root, to unpack files of other owners and to mount /proc for the packages' scripts"
    )]
    NotRoot,
    #[error("`{program}` is not installed; on Debian and Ubuntu: apt-get install {package}")]
    MissingProgram { program: &'static str, package: &'static str },
    #[error("Debian's signing keys are not installed; on Debian and Ubuntu: apt-get install debian-archive-keyring")]
    MissingKeyring,
    #[error("{path} exists already; a build never overwrites another")]
    AlreadyExists { path: PathBuf },
    #[error("another build is writing {path}; wait for it to end")]
    Busy { path: PathBuf },
    #[error("the host CA certificates cannot be used")]
    Certificates(#[source] CertificateError),
    #[error(
        "the mirror {mirror} does not answer ({detail}); check its address, the network and http_proxy, \
         or set `mirror` in [template_build]"
    )]
    MirrorUnreachable { mirror: String, detail: String },
    #[error(
        "a mirror lacks what the recipe asks for ({detail}); check `suite`, \
         and `mirror` and `security_mirror` in [template_build]"
    )]
    SuiteMissing { detail: String },
    #[error("apt does not trust the mirror ({detail}); upgrade debian-archive-keyring, or choose another mirror")]
    Untrusted { detail: String },
    #[error(
        "the mirror's index is out of date or this machine's clock is wrong ({detail}); \
         compare `date` and choose another mirror if it is right"
    )]
    Expired { detail: String },
    #[error("Debian has no such package in this suite: {names}")]
    UnknownPackages { names: String },
    #[error("no space is left on the disk of {path}; a base template needs about 2 GB while it is built")]
    DiskFull { path: PathBuf },
    #[error("command {number} of the recipe's `run` failed: {command}\n{detail}")]
    CommandFailed { number: usize, command: String, detail: String },
    #[error("the build took longer than {} minutes", .limit.as_secs() / 60)]
    TimedOut { limit: Duration },
    #[error("mmdebstrap failed ({status}); its last words:\n{detail}")]
    Failed { status: String, detail: String },
    #[error("cannot {action} {path}")]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the thread that finishes the build died")]
    Interrupted(#[source] tokio::task::JoinError),
}

impl BuildError {
    fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Self::DiskFull { path },
            _ => Self::File { action, path, source },
        }
    }
}

/// Where the root filesystem of the build at `dest` lies.
pub fn rootfs_of(dest: &Path) -> PathBuf {
    dest.join("rootfs")
}

/// Builds `recipe` into the directory `dest`, which must not exist: afterwards it holds `rootfs/` and `build.json`
/// (what [`BuildMetadata::load`] reads). Needs root. Takes under a minute for the base template on a fast network.
///
/// Dropping the future stops the build; so does the end of this process.
///
/// # Errors
/// Every [`BuildError`]; `dest` does not exist then.
pub async fn build_rootfs(
    recipe: &Recipe,
    options: &BuildOptions,
    dest: &Path,
    mut progress: impl FnMut(Progress) + Send,
) -> Result<BuildMetadata, BuildError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(BuildError::NotRoot);
    }
    let certificates = HostCertificates::read(&options.host_ca_certificates).map_err(BuildError::Certificates)?;

    progress(Progress::at(Step::Prepare));
    let staging = Staging::begin(dest).await?;
    let outcome = fill(recipe, options, &certificates, &staging, &mut progress).await;
    match outcome {
        Ok(metadata) => {
            staging.commit().await?;
            progress(Progress::at(Step::Done));
            Ok(metadata)
        }
        Err(error) => {
            // The first error is the one worth telling; what cannot be removed now, the next build removes.
            if let Err(leftover) = staging.discard().await {
                tracing::warn!(error = %leftover, "cannot remove a failed build");
            }
            Err(error)
        }
    }
}

async fn fill(
    recipe: &Recipe,
    options: &BuildOptions,
    certificates: &HostCertificates,
    staging: &Staging,
    progress: &mut (impl FnMut(Progress) + Send),
) -> Result<BuildMetadata, BuildError> {
    let environment = certificates.environment_with(&recipe.env);
    mmdebstrap::run(recipe, options, certificates, &environment, staging, progress).await?;

    progress(Progress::at(Step::Finish));
    let job = finish::Job {
        recipe: recipe.clone(),
        mirror: options.mirror.clone(),
        security_mirror: options.security_mirror.clone().unwrap_or_else(|| options.mirror.security()),
        environment,
        host_ca_digest: certificates.digest(),
        directory: staging.directory().to_owned(),
        // A dropped future does not stop a blocking task: the clone of the lock keeps others out until it has ended.
        lock: staging.lock_handle()?,
    };
    tokio::task::spawn_blocking(move || job.run()).await.map_err(BuildError::Interrupted)?
}
