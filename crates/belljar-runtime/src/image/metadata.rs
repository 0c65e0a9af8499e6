//! `build.json`: what a build consists of, written beside its root filesystem.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

const FILE_NAME: &str = "build.json";

/// What a finished build tells about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildMetadata {
    /// The template's name in the recipe.
    pub template: String,
    /// [`Recipe::digest`](super::Recipe::digest) of what was built.
    pub recipe_digest: String,
    /// Digest of the host's CA certificates inside; none when the operator hands none in.
    pub host_ca_digest: Option<String>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// Debian's code name.
    pub suite: String,
    /// Where the packages came from, without credentials.
    pub mirror: String,
    pub user: BuiltUser,
    /// Where commands start.
    pub working_directory: String,
    /// The environment of every command: the recipe's, and the variables that make programs use the system's CAs.
    pub env: BTreeMap<String, String>,
    /// Installed packages and their versions.
    pub packages: BTreeMap<String, String>,
    /// What the root filesystem occupies on disk.
    pub rootfs_bytes: u64,
    /// How many files, directories and links it has.
    pub rootfs_entries: u64,
}

/// The account that commands run under.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuiltUser {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    pub home: String,
}

/// Why a build's metadata cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum MetadataError {
    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} is damaged; build the template again")]
    Damaged {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

impl BuildMetadata {
    /// Reads the metadata of the build at `dest`.
    pub fn load(dest: &Path) -> Result<Self, MetadataError> {
        let path = dest.join(FILE_NAME);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(source) => return Err(MetadataError::Read { path, source }),
        };
        serde_json::from_slice(&bytes).map_err(|source| MetadataError::Damaged { path, source })
    }

    pub(super) fn store(&self, directory: &Path) -> std::io::Result<()> {
        std::fs::write(directory.join(FILE_NAME), serde_json::to_vec_pretty(self)?)
    }
}

/// Name and version of every installed package, from dpkg's database in the root filesystem.
pub(super) fn installed_packages(rootfs: &Path) -> std::io::Result<BTreeMap<String, String>> {
    let mut packages = BTreeMap::new();
    let (mut name, mut is_installed) = (String::new(), false);
    for line in BufReader::new(File::open(rootfs.join("var/lib/dpkg/status"))?).lines() {
        let line = line?;
        if let Some(value) = line.strip_prefix("Package: ") {
            name = value.to_owned();
        } else if let Some(value) = line.strip_prefix("Status: ") {
            is_installed = value.ends_with(" installed");
        } else if let Some(version) = line.strip_prefix("Version: ").filter(|_| is_installed) {
            packages.insert(std::mem::take(&mut name), version.to_owned());
        }
    }
    Ok(packages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_installed_packages_are_listed() {
        let rootfs = tempfile::tempdir().expect("a directory");
        std::fs::create_dir_all(rootfs.path().join("var/lib/dpkg")).expect("created");
        let status = "Package: less\nStatus: install ok installed\nArchitecture: amd64\n\
                      Version: 668-1\nDescription: x\n Version: no\n\n\
                      Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n\n";
        std::fs::write(rootfs.path().join("var/lib/dpkg/status"), status).expect("written");
        let packages = installed_packages(rootfs.path()).expect("readable");
        assert_eq!(packages, BTreeMap::from([("less".to_owned(), "668-1".to_owned())]));
    }

    #[test]
    fn damage_is_told_from_absence() {
        let dest = tempfile::tempdir().expect("a directory");
        assert!(matches!(BuildMetadata::load(dest.path()), Err(MetadataError::Read { .. })));
        std::fs::write(dest.path().join(FILE_NAME), "{").expect("written");
        assert!(matches!(BuildMetadata::load(dest.path()), Err(MetadataError::Damaged { .. })));
    }
}
