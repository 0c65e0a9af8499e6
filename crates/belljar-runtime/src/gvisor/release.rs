//! Which `runsc` is used, and where it comes from.
//!
//! gVisor's engine is one static binary. Debian packages it, so the mirror that templates are built from has it too;
//! its file runs on any distribution. belljar unpacks the one file out of a pinned package into its own state directory
//! and never touches the host's package sources. Both the package and the file inside are pinned by SHA-256: the first
//! is checked before anything reads the archive, the second whenever the file is about to be used.
//!
//! ```text
//! configured path ──> taken as it is
//! <state>/engine/runsc-<version>/runsc, digest right ──> taken
//! mirror, then Debian's snapshot archive ──> digest ──> unpack ──> digest ──> rename ──> taken
//! ```

use std::fs::{File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::image::Mirror;

/// A package of runsc that belljar knows.
#[derive(Debug)]
struct Release {
    /// Debian's version of the package.
    version: &'static str,
    package_sha256: &'static str,
    binary_sha256: &'static str,
    /// A mirror that keeps the package when Debian's ordinary mirrors have replaced it.
    archive: Option<&'static str>,
}

impl Release {
    fn binary_in(&self, engine_dir: &Path) -> PathBuf {
        engine_dir.join(format!("runsc-{}", self.version)).join("runsc")
    }
}

/// Best first: the one that everything was measured with (Debian 13), then what replaces it (Debian's development
/// branch, the same gVisor compiled by a newer Go).
const RELEASES: [Release; 2] = [
    Release {
        version: "0.0~20240729.0-4+b7",
        package_sha256: "3c25a5130dfac2f71237d5baad56ac86a255de87a0400f11b36a555156dc325a",
        binary_sha256: "ce52e04038baa76d6069afae5fc1bee60c153bbf0276f2c3c25506553526f38f",
        archive: Some("https://snapshot.debian.org/archive/debian/20261001T000000Z"),
    },
    Release {
        version: "0.0~20240729.0-7+b1",
        package_sha256: "8d14cbe155dcbd61f44d933573c8e7a37dc4668924d2474339fdbfb3bdb3f06e",
        binary_sha256: "9bfb49b7070b19585a40748ce549ca915bc734ddefdcf0e0555e3bff17670360",
        archive: None,
    },
];

const POOL: &str = "pool/main/g/golang-gvisor-gvisor";
const BINARY_IN_PACKAGE: &str = "usr/bin/runsc";
const LARGEST_PACKAGE_BYTES: u64 = 64 * 1024 * 1024;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const DOWNLOAD_TIMEOUT: Duration = Duration::from_secs(300);

/// Why no runsc can be had.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    #[error(
        "the configured runsc {path} is not a program that can be run; correct the path, \
         or remove it to have belljar fetch one"
    )]
    Configured {
        path: PathBuf,
        #[source]
        source: Option<io::Error>,
    },
    #[error("belljar fetches runsc for x86_64 only; on this machine install runsc and configure its path")]
    Architecture,
    #[error(
        "cannot download runsc from {url}; check the mirror, the network and http_proxy, \
         or configure the path of a runsc"
    )]
    Download {
        url: String,
        #[source]
        source: Box<ureq::Error>,
    },
    #[error("{url} sent another file than the pinned one (SHA-256 {found}); it was not unpacked")]
    Digest { url: String, found: String },
    #[error("the runsc package {version} cannot be unpacked: {reason}")]
    Unpack {
        version: &'static str,
        reason: &'static str,
        #[source]
        source: Option<io::Error>,
    },
    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot write runsc to {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the thread that fetches runsc died")]
    Interrupted(#[source] tokio::task::JoinError),
}

/// The path of a runsc to use: `configured` if given, else one of the pinned ones, fetched from `mirror` into
/// `state_dir` when it is not there yet.
///
/// # Errors
/// Every [`ReleaseError`]; of several failed downloads the first.
pub async fn ensure_runsc(
    state_dir: &Path,
    configured: Option<&Path>,
    mirror: &Mirror,
) -> Result<PathBuf, ReleaseError> {
    if let Some(path) = configured {
        return check_configured(path);
    }
    if std::env::consts::ARCH != "x86_64" {
        return Err(ReleaseError::Architecture);
    }
    let (engine_dir, mirror) = (state_dir.join("engine"), mirror.clone());
    tokio::task::spawn_blocking(move || find_or_fetch(&engine_dir, &mirror, &RELEASES))
        .await
        .map_err(ReleaseError::Interrupted)?
}

/// The pinned runsc that is in `engine_dir` (`<state>/engine`) already; nothing is fetched.
#[must_use]
pub fn present(engine_dir: &Path) -> Option<PathBuf> {
    find(engine_dir, &RELEASES).ok().flatten()
}

fn check_configured(path: &Path) -> Result<PathBuf, ReleaseError> {
    let refuse = |source| ReleaseError::Configured { path: path.to_owned(), source };
    let metadata = std::fs::metadata(path).map_err(|error| refuse(Some(error)))?;
    if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 {
        return Err(refuse(None));
    }
    Ok(path.to_owned())
}

fn find_or_fetch(engine_dir: &Path, mirror: &Mirror, releases: &[Release]) -> Result<PathBuf, ReleaseError> {
    let write_error = |path: &Path| {
        let path = path.to_owned();
        |source| ReleaseError::Write { path, source }
    };
    std::fs::create_dir_all(engine_dir).map_err(write_error(engine_dir))?;
    // Two programs on one state directory (`belljar up`, `belljar doctor`) fetch one after the other.
    let lock = File::open(engine_dir).map_err(write_error(engine_dir))?;
    lock.lock().map_err(write_error(engine_dir))?;

    if let Some(binary) = find(engine_dir, releases)? {
        return Ok(binary);
    }
    let mut first_error = None;
    for release in releases {
        let main = (mirror.with_credentials(), mirror.to_string());
        let archive = release.archive.map(|address| (address.to_owned(), address.to_owned()));
        for (address, shown) in std::iter::once(main).chain(archive) {
            match fetch(release, &address, &shown) {
                Ok(bytes) => {
                    let binary = release.binary_in(engine_dir);
                    install(&bytes, &binary).map_err(write_error(&binary))?;
                    tracing::info!(version = release.version, from = %shown, "fetched runsc");
                    return Ok(binary);
                }
                Err(error) => {
                    tracing::warn!(version = release.version, from = %shown, error = %error, "no runsc from here");
                    first_error.get_or_insert(error);
                }
            }
        }
    }
    Err(first_error.expect("there is a release to try, and it failed"))
}

/// The best of `releases` that is in `engine_dir` unchanged.
fn find(engine_dir: &Path, releases: &[Release]) -> Result<Option<PathBuf>, ReleaseError> {
    for release in releases {
        let binary = release.binary_in(engine_dir);
        match std::fs::read(&binary) {
            Ok(bytes) if sha256(&bytes) == release.binary_sha256 => return Ok(Some(binary)),
            Ok(_) => tracing::warn!(path = %binary.display(), "this runsc is not the pinned one and is not used"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(ReleaseError::Read { path: binary, source }),
        }
    }
    Ok(None)
}

/// The verified binary of `release` from the mirror at `address`, called `shown` in what people read.
fn fetch(release: &Release, address: &str, shown: &str) -> Result<Vec<u8>, ReleaseError> {
    let file = format!("{POOL}/runsc_{}_amd64.deb", release.version);
    let url = format!("{shown}/{file}");
    let package = download(&format!("{address}/{file}"))
        .map_err(|source| ReleaseError::Download { url: url.clone(), source: Box::new(source) })?;
    let found = sha256(&package);
    if found != release.package_sha256 {
        return Err(ReleaseError::Digest { url, found });
    }
    let binary = unpack(&package).map_err(|source| ReleaseError::Unpack {
        version: release.version,
        reason: "its format is not the expected one",
        source: Some(source),
    })?;
    if sha256(&binary) != release.binary_sha256 {
        return Err(ReleaseError::Unpack {
            version: release.version,
            reason: "the binary inside is another",
            source: None,
        });
    }
    Ok(binary)
}

fn download(url: &str) -> Result<Vec<u8>, ureq::Error> {
    // The machine's own trust store (and SSL_CERT_FILE), since a private mirror has a private CA. Proxies come from the
    // environment by default.
    let tls = ureq::tls::TlsConfig::builder().root_certs(ureq::tls::RootCerts::PlatformVerifier).build();
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .tls_config(tls)
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .timeout_global(Some(DOWNLOAD_TIMEOUT))
        .build()
        .into();
    agent.get(url).call()?.body_mut().with_config().limit(LARGEST_PACKAGE_BYTES).read_to_vec()
}

/// The file runsc out of a Debian package: an `ar` archive that holds `data.tar.xz`.
fn unpack(package: &[u8]) -> io::Result<Vec<u8>> {
    let data = ar_member(package, "data.tar.xz").ok_or_else(|| invalid("no data.tar.xz in the package"))?;
    let mut archive = tar::Archive::new(lzma_rust2::XzReader::new(data, true));
    for entry in archive.entries()? {
        let mut entry = entry?;
        let is_binary = entry.path()?.strip_prefix("./").is_ok_and(|path| path == Path::new(BINARY_IN_PACKAGE));
        if is_binary && entry.header().entry_type().is_file() {
            let mut binary = Vec::new();
            entry.read_to_end(&mut binary)?;
            return Ok(binary);
        }
    }
    Err(invalid("no usr/bin/runsc in the package"))
}

/// A member of an `ar` archive of the kind in deb(5): names of at most 15 characters, padded with spaces.
fn ar_member<'a>(archive: &'a [u8], wanted: &str) -> Option<&'a [u8]> {
    const HEADER_BYTES: usize = 60;
    let mut rest = archive.strip_prefix(b"!<arch>\n")?;
    while rest.len() >= HEADER_BYTES {
        let (header, content) = rest.split_at(HEADER_BYTES);
        let name = std::str::from_utf8(&header[..16]).ok()?.trim_end().trim_end_matches('/');
        let size: usize = std::str::from_utf8(&header[48..58]).ok()?.trim_end().parse().ok()?;
        let member = content.get(..size)?;
        if name == wanted {
            return Some(member);
        }
        // Members begin at even offsets.
        rest = content.get(size + size % 2..)?;
    }
    None
}

/// Writes the binary beside its place and renames it: under its name there is never half a file.
fn install(bytes: &[u8], binary: &Path) -> io::Result<()> {
    let directory = binary.parent().ok_or_else(|| invalid("a binary lies in a directory"))?;
    std::fs::create_dir_all(directory)?;
    let partial = binary.with_extension("partial");
    let mut file = File::create(&partial)?;
    file.write_all(bytes)?;
    file.set_permissions(Permissions::from_mode(0o755))?;
    file.sync_all()?;
    // Closed before it is renamed: a file open for writing cannot be executed.
    drop(file);
    std::fs::rename(&partial, binary)?;
    File::open(directory)?.sync_all()
}

fn invalid(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

fn sha256(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn member(name: &str, content: &str) -> Vec<u8> {
        let padding = if content.len() % 2 == 1 { "\n" } else { "" };
        format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n{content}{padding}", 0, 0, 0, 100_644, content.len())
            .into_bytes()
    }

    /// A mirror that answers every request with `body`, and counts them.
    fn mirror_serving(body: &'static [u8]) -> (Mirror, std::sync::mpsc::Receiver<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                let mut connection = connection.expect("a connection");
                let mut request = [0; 4096];
                let length = connection.read(&mut request).expect("a request");
                let text = String::from_utf8_lossy(&request[..length]).into_owned();
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
                connection.write_all(head.as_bytes()).and_then(|()| connection.write_all(body)).expect("answered");
                if sender.send(text.lines().next().unwrap_or_default().to_owned()).is_err() {
                    return;
                }
            }
        });
        (format!("http://{address}/debian").parse().expect("a mirror"), receiver)
    }

    fn release(package: &[u8], binary: &[u8]) -> Release {
        let leak = |bytes| -> &'static str { Box::leak(sha256(bytes).into_boxed_str()) };
        Release { version: "1", package_sha256: leak(package), binary_sha256: leak(binary), archive: None }
    }

    #[test]
    fn members_of_an_archive_are_found_and_damage_is_not_fatal() {
        let archive = [b"!<arch>\n".to_vec(), member("debian-binary", "2.0"), member("data.tar.xz", "hello")].concat();
        assert_eq!(ar_member(&archive, "data.tar.xz"), Some(&b"hello"[..]));
        assert_eq!(ar_member(&archive, "control.tar.xz"), None);
        for length in 0..archive.len() - 1 {
            assert_eq!(ar_member(&archive[..length], "data.tar.xz"), None, "cut at {length}");
        }
    }

    #[test]
    fn another_file_than_the_pinned_one_is_never_unpacked() {
        let (mirror, requests) = mirror_serving(b"<html>captive portal</html>");
        let state = tempfile::tempdir().expect("a directory");
        let error = find_or_fetch(state.path(), &mirror, &[release(b"expected", b"binary")]).expect_err("refused");
        assert!(matches!(error, ReleaseError::Digest { .. }), "{error}");
        let request = requests.recv().expect("a request");
        assert!(request.starts_with("GET /debian/pool/main/g/golang-gvisor-gvisor/runsc_1_amd64.deb "), "{request}");
        assert_eq!(std::fs::read_dir(state.path()).expect("there").count(), 0);
    }

    #[test]
    fn a_pinned_package_that_is_none_is_an_error() {
        let (mirror, _requests) = mirror_serving(b"!<arch>\nnonsense");
        let state = tempfile::tempdir().expect("a directory");
        let error = find_or_fetch(state.path(), &mirror, &[release(b"!<arch>\nnonsense", b"x")]).expect_err("refused");
        assert!(matches!(error, ReleaseError::Unpack { .. }), "{error}");
    }

    #[test]
    fn what_is_there_is_used_without_the_network_but_not_if_it_was_changed() {
        let nowhere: Mirror = "http://127.0.0.1:1/debian".parse().expect("a mirror");
        let state = tempfile::tempdir().expect("a directory");
        let binary = state.path().join("runsc-1/runsc");
        install(b"binary", &binary).expect("installed");
        assert_eq!(std::fs::metadata(&binary).expect("there").permissions().mode() & 0o777, 0o755);
        let releases = [release(b"package", b"binary")];
        assert_eq!(find_or_fetch(state.path(), &nowhere, &releases).expect("found"), binary);
        std::fs::write(&binary, "changed").expect("written");
        let error = find_or_fetch(state.path(), &nowhere, &releases).expect_err("cannot be fetched");
        assert!(matches!(error, ReleaseError::Download { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_configured_path_is_checked_and_otherwise_trusted() {
        let state = tempfile::tempdir().expect("a directory");
        let mirror = Mirror::default();
        let program = state.path().join("runsc");
        std::fs::write(&program, "#!/bin/sh").expect("written");
        assert!(matches!(
            ensure_runsc(state.path(), Some(&program), &mirror).await,
            Err(ReleaseError::Configured { .. })
        ));
        std::fs::set_permissions(&program, Permissions::from_mode(0o755)).expect("made executable");
        assert_eq!(ensure_runsc(state.path(), Some(&program), &mirror).await.expect("taken"), program);
    }

    /// Needs a Debian mirror: `BELLJAR_DEBIAN_MIRROR`, or Debian's own.
    #[tokio::test]
    async fn the_pinned_runsc_is_fetched_once_and_runs() {
        let mirror: Mirror = match std::env::var("BELLJAR_DEBIAN_MIRROR") {
            Ok(text) => text.parse().expect("BELLJAR_DEBIAN_MIRROR is a mirror's address"),
            Err(_) => Mirror::default(),
        };
        let state = tempfile::tempdir().expect("a directory");
        let binary = match ensure_runsc(state.path(), None, &mirror).await {
            Ok(binary) => binary,
            Err(ReleaseError::Download { .. } | ReleaseError::Architecture) => {
                let _ = writeln!(
                    io::stderr(),
                    "SKIPPED the_pinned_runsc_is_fetched_once_and_runs: {mirror} does not answer"
                );
                return;
            }
            Err(error) => panic!("{error}"),
        };
        let output = std::process::Command::new(&binary).arg("--version").output().expect("it runs");
        assert!(String::from_utf8_lossy(&output.stdout).starts_with("runsc version "));

        let nowhere: Mirror = "http://127.0.0.1:1/debian".parse().expect("a mirror");
        assert_eq!(ensure_runsc(state.path(), None, &nowhere).await.expect("it is there"), binary);
    }
}
