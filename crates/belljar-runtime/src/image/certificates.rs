//! The host's CA certificates, handed into a template where the operator asks for it.
//!
//! A machine behind an inspecting proxy, or with a private package mirror, needs its own CA trusted inside sandboxes
//! too. Trust is never handed over unasked: what a sandbox trusts is visible in the operator's configuration.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";
const LARGEST_FILE_BYTES: u64 = 4 * 1024 * 1024;

/// The bundle that Debian's `update-ca-certificates` maintains.
const BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Programs that bring a trust store of their own, and the variable that makes them use the system's.
const BUNDLE_VARIABLES: [&str; 6] = [
    "SSL_CERT_FILE",       // OpenSSL's users: Python, Ruby; uv, Go
    "CURL_CA_BUNDLE",      // curl linked against something else than the system's library
    "REQUESTS_CA_BUNDLE",  // Python's requests, which reads certifi
    "PIP_CERT",            // pip, likewise
    "NODE_EXTRA_CA_CERTS", // Node.js, compiled in
    "DENO_CERT",           // Deno, compiled in
];

/// Why the operator's certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error("cannot read {path}, which `host_ca_certificates` names")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path}, which `host_ca_certificates` names, is larger than {LARGEST_FILE_BYTES} bytes")]
    TooLarge { path: PathBuf },
    #[error("{path}, which `host_ca_certificates` names, holds no PEM certificate")]
    NoCertificate { path: PathBuf },
}

/// Certificates to be trusted in the new system besides Debian's.
#[derive(Debug, Default)]
pub(super) struct HostCertificates {
    /// One PEM block each, since `update-ca-certificates` wants one certificate per file.
    blocks: Vec<String>,
}

impl HostCertificates {
    pub(super) fn read(paths: &[PathBuf]) -> Result<Self, CertificateError> {
        let mut blocks = Vec::new();
        for path in paths {
            blocks.extend(blocks_of(path)?);
        }
        blocks.sort();
        blocks.dedup();
        Ok(Self { blocks })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    pub(super) fn blocks(&self) -> &[String] {
        &self.blocks
    }

    /// Tells one set of certificates from another, so that a template can be seen to be older than the configuration.
    pub(super) fn digest(&self) -> Option<String> {
        (!self.is_empty()).then(|| format!("sha256:{:x}", Sha256::digest(self.blocks.concat())))
    }

    /// `environment` with what makes programs with a trust store of their own use the system's. The recipe wins.
    pub(super) fn environment_with(&self, environment: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        let mut all = BTreeMap::new();
        if !self.is_empty() {
            all.extend(BUNDLE_VARIABLES.map(|name| (name.to_owned(), BUNDLE.to_owned())));
        }
        all.extend(environment.clone());
        all
    }
}

/// Copies the certificates out of a PEM file and nothing else: a private key in the same file stays on the host.
fn blocks_of(path: &Path) -> Result<Vec<String>, CertificateError> {
    let read_error = |source| CertificateError::Read { path: path.to_owned(), source };
    if std::fs::metadata(path).map_err(read_error)?.len() > LARGEST_FILE_BYTES {
        return Err(CertificateError::TooLarge { path: path.to_owned() });
    }
    let text = String::from_utf8_lossy(&std::fs::read(path).map_err(read_error)?).into_owned();
    let blocks: Vec<String> = text
        .split(BEGIN)
        .skip(1)
        .filter_map(|rest| rest.split_once(END))
        .filter(|(body, _)| body.chars().all(|c| c.is_ascii_alphanumeric() || c.is_whitespace() || "+/=".contains(c)))
        .map(|(body, _)| format!("{BEGIN}\n{}\n{END}\n", body.split_whitespace().collect::<Vec<_>>().join("\n")))
        .collect();
    if blocks.is_empty() {
        return Err(CertificateError::NoCertificate { path: path.to_owned() });
    }
    Ok(blocks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(content: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(file.path(), content).expect("writable");
        file
    }

    #[test]
    fn a_bundle_is_split_and_a_private_key_left_behind() {
        let bundle = file(&format!(
            "# two\n{BEGIN}\r\nAAAA\r\nBBBB\r\n{END}\n-----BEGIN PRIVATE KEY-----\nsecret\n-----END PRIVATE KEY-----\n\
             {BEGIN}\nCCCC\n{END}\n"
        ));
        let certificates = HostCertificates::read(&[bundle.path().to_owned()]).expect("readable");
        let expected = [format!("{BEGIN}\nAAAA\nBBBB\n{END}\n"), format!("{BEGIN}\nCCCC\n{END}\n")];
        assert_eq!(certificates.blocks(), expected);
    }

    #[test]
    fn the_same_certificate_counts_once_and_order_does_not_matter() {
        let (one, two) = (file(&format!("{BEGIN}\nAAAA\n{END}\n")), file(&format!("{BEGIN}\nBBBB\n{END}\n")));
        let [a, b] = [one.path().to_owned(), two.path().to_owned()];
        let digest = HostCertificates::read(&[a.clone(), b.clone(), a.clone()]).expect("readable").digest();
        assert!(digest.is_some());
        assert_eq!(HostCertificates::read(&[b, a]).expect("readable").digest(), digest);
    }

    #[test]
    fn files_without_a_certificate_are_refused_by_name() {
        let empty = file("nothing here");
        let error = HostCertificates::read(&[empty.path().to_owned()]).expect_err("no certificate");
        assert!(error.to_string().contains(&empty.path().display().to_string()));
        assert!(matches!(HostCertificates::read(&["/nowhere".into()]), Err(CertificateError::Read { .. })));
    }

    #[test]
    fn the_environment_changes_only_when_certificates_are_given() {
        let recipe = BTreeMap::from([("PIP_CERT".to_owned(), "/mine".to_owned())]);
        assert_eq!(HostCertificates::default().environment_with(&recipe), recipe);
        assert_eq!(HostCertificates::default().digest(), None);
        let some = HostCertificates { blocks: vec!["x".into()] };
        let environment = some.environment_with(&recipe);
        assert_eq!(environment["PIP_CERT"], "/mine");
        assert_eq!(environment["NODE_EXTRA_CA_CERTS"], BUNDLE);
    }
}
