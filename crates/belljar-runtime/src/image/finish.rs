//! The last step of a build: no trace of this machine in it, mount points in place, everything measured.

use std::collections::{BTreeMap, HashSet};
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use time::OffsetDateTime;

use super::metadata::{BuildMetadata, BuiltUser, installed_packages};
use super::mmdebstrap::sources;
use super::recipe::Recipe;
use super::{BuildError, Mirror};

/// Directories that a sandbox mounts something on; the root filesystem is read-only then, so they must be there.
/// `.belljar` is for the agent.
const MOUNT_POINTS: [(&str, u32); 6] =
    [("proc", 0o755), ("sys", 0o755), ("dev", 0o755), ("run", 0o755), ("tmp", 0o1777), (".belljar", 0o755)];

/// Files that say which machine this is. A sandbox gets its own; until then they are neutral.
const NEUTRAL_FILES: [(&str, &str); 4] = [
    ("etc/hostname", "localhost\n"),
    ("etc/hosts", "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"),
    ("etc/resolv.conf", ""),
    // Empty, not absent: machine-id(5) asks for it in images that are started many times.
    ("etc/machine-id", ""),
];

/// The signing keys' name inside, in Debian 13 and before.
const KEYRINGS_INSIDE: [&str; 2] =
    ["usr/share/keyrings/debian-archive-keyring.pgp", "usr/share/keyrings/debian-archive-keyring.gpg"];

/// All that the last step needs; it runs on a thread of its own.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) recipe: Recipe,
    pub(super) mirror: Mirror,
    pub(super) security_mirror: Mirror,
    pub(super) environment: BTreeMap<String, String>,
    pub(super) host_ca_digest: Option<String>,
    pub(super) directory: PathBuf,
    /// Held until the job has ended.
    pub(super) lock: File,
}

impl Job {
    pub(super) fn run(self) -> Result<BuildMetadata, BuildError> {
        let rootfs = super::rootfs_of(&self.directory);
        let inputs = self.directory.join("inputs");
        std::fs::remove_dir_all(&inputs).map_err(BuildError::file("remove", inputs))?;
        self.neutralize(&rootfs).map_err(BuildError::file("clean", &rootfs))?;

        let user = &self.recipe.user;
        let packages = installed_packages(&rootfs).map_err(BuildError::file("list the packages of", &rootfs))?;
        let (rootfs_bytes, rootfs_entries) = measure(&rootfs).map_err(BuildError::file("measure", &rootfs))?;
        let metadata = BuildMetadata {
            template: self.recipe.name.clone(),
            recipe_digest: self.recipe.digest(),
            host_ca_digest: self.host_ca_digest.clone(),
            created_at: OffsetDateTime::now_utc(),
            suite: self.recipe.suite.clone(),
            mirror: self.mirror.to_string(),
            user: BuiltUser { name: user.name.clone(), uid: user.uid, gid: user.uid, home: user.home.clone() },
            working_directory: self.recipe.working_directory().to_owned(),
            env: self.environment.clone(),
            packages,
            rootfs_bytes,
            rootfs_entries,
        };
        metadata.store(&self.directory).map_err(BuildError::file("write the metadata of", &self.directory))?;
        drop(self.lock);
        Ok(metadata)
    }

    fn neutralize(&self, rootfs: &Path) -> io::Result<()> {
        for (name, content) in NEUTRAL_FILES {
            replace(&rootfs.join(name), content)?;
        }
        self.replace_sources(rootfs)?;
        remove_host_keys(&rootfs.join("etc/ssh"))?;

        // mmdebstrap makes device nodes; a sandbox mounts its own /dev, and nodes do not belong into a plain directory.
        let dev = rootfs.join("dev");
        std::fs::remove_dir_all(&dev)?;
        for (name, mode) in MOUNT_POINTS {
            let path = rootfs.join(name);
            std::fs::create_dir_all(&path)?;
            std::fs::set_permissions(&path, Permissions::from_mode(mode))?;
        }
        // Whoever serves the sandbox's user must be able to enter, whatever the umask of the build was.
        std::fs::set_permissions(rootfs, Permissions::from_mode(0o755))
    }

    /// The mirrors again, this time without the operator's credentials.
    fn replace_sources(&self, rootfs: &Path) -> io::Result<()> {
        let apt = rootfs.join("etc/apt");
        if !apt.join("sources.list.d").is_dir() {
            return Ok(()); // a system without apt
        }
        remove_if_there(&apt.join("sources.list"))?;
        for entry in std::fs::read_dir(apt.join("sources.list.d"))? {
            std::fs::remove_file(entry?.path())?;
        }
        let keyring = KEYRINGS_INSIDE.into_iter().find(|name| rootfs.join(name).exists()).unwrap_or(KEYRINGS_INSIDE[0]);
        let stanzas: Vec<String> = sources(&self.recipe, &self.mirror, Some(&self.security_mirror), Mirror::to_string)
            .into_iter()
            .map(|(address, suite)| {
                format!("Types: deb\nURIs: {address}\nSuites: {suite}\nComponents: main\nSigned-By: /{keyring}\n")
            })
            .collect();
        replace(&apt.join("sources.list.d/debian.sources"), &stanzas.join("\n"))
    }
}

/// Writes a file anew. Never through what is there: a link in the new system may point to an absolute path, which here
/// would be the host's.
fn replace(path: &Path, content: &str) -> io::Result<()> {
    remove_if_there(path)?;
    let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(content.as_bytes())?;
    file.set_permissions(Permissions::from_mode(0o644))
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

/// Keys that an SSH server's package made during the build would be the same in every sandbox.
fn remove_host_keys(directory: &Path) -> io::Result<()> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(b"ssh_host_") {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Occupied bytes and number of entries; a file of several names counts its bytes once.
fn measure(root: &Path) -> io::Result<(u64, u64)> {
    let (mut bytes, mut entries) = (0, 0);
    let mut seen = HashSet::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            entries += 1;
            if metadata.is_dir() {
                directories.push(entry.path());
            }
            if metadata.is_dir() || metadata.nlink() == 1 || seen.insert(metadata.ino()) {
                bytes += metadata.blocks() * 512;
            }
        }
    }
    Ok((bytes, entries))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn files_are_replaced_and_never_written_through_a_link() {
        let directory = tempfile::tempdir().expect("a directory");
        let (outside, inside) = (directory.path().join("outside"), directory.path().join("inside"));
        std::fs::write(&outside, "the host's").expect("written");
        symlink(&outside, &inside).expect("linked");
        replace(&inside, "the sandbox's").expect("replaced");
        assert_eq!(std::fs::read_to_string(&outside).expect("readable"), "the host's");
        assert_eq!(std::fs::read_to_string(&inside).expect("readable"), "the sandbox's");
    }

    #[test]
    fn hard_links_are_measured_once() {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::write(directory.path().join("one"), vec![1; 100_000]).expect("written");
        File::open(directory.path().join("one")).expect("opened").sync_all().expect("on disk");
        let (bytes, entries) = measure(directory.path()).expect("measured");
        assert!(bytes >= 100_000 && entries == 1);
        std::fs::hard_link(directory.path().join("one"), directory.path().join("two")).expect("linked");
        assert_eq!(measure(directory.path()).expect("measured"), (bytes, 2));
    }

    #[test]
    fn ssh_host_keys_are_removed() {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::write(directory.path().join("ssh_host_ed25519_key"), "secret").expect("written");
        std::fs::write(directory.path().join("ssh_config"), "kept").expect("written");
        remove_host_keys(directory.path()).expect("removed");
        let left: Vec<_> = std::fs::read_dir(directory.path()).expect("there").collect();
        assert_eq!(left.len(), 1);
        remove_host_keys(&directory.path().join("nowhere")).expect("nothing to do");
    }
}
