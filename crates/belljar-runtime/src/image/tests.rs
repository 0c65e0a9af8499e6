//! Builds for real. They need root, mmdebstrap and a Debian mirror (`BELLJAR_DEBIAN_MIRROR`, or Debian's own), and say
//! what is missing when they are skipped. `BELLJAR_APT_OPTIONS` (one per line) is for mirrors that need some.

use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Command;

use super::*;

/// Says that a test is skipped, past the test runner's capture of what passing tests print.
fn skip(test: &str, reason: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {reason}");
}

pub(super) fn skipped_without_root(test: &str) -> bool {
    let missing = !nix::unistd::geteuid().is_root();
    if missing {
        skip(test, "needs root, for namespaces");
    }
    missing
}

/// What a test builds with, or `None` when the machine lacks something.
fn options(test: &str) -> Option<BuildOptions> {
    if skipped_without_root(test) {
        return None;
    }
    if !Path::new("/usr/bin/mmdebstrap").exists() {
        skip(test, "mmdebstrap is not installed");
        return None;
    }
    let mirror: Mirror = match std::env::var("BELLJAR_DEBIAN_MIRROR") {
        Ok(text) => text.parse().expect("BELLJAR_DEBIAN_MIRROR is a mirror's address"),
        Err(_) => Mirror::default(),
    };
    let release = format!("{}/dists/trixie/InRelease", mirror.with_credentials());
    let mut apt_helper = Command::new("/usr/lib/apt/apt-helper");
    let target = tempfile::NamedTempFile::new().expect("a temporary file");
    apt_helper
        .args(["-oAcquire::Retries=0", "-oAcquire::http::Timeout=20", "download-file", &release])
        .arg(target.path());
    if !apt_helper.output().is_ok_and(|output| output.status.success()) {
        skip(test, &format!("the mirror {mirror} does not answer"));
        return None;
    }
    let apt_options = std::env::var("BELLJAR_APT_OPTIONS").unwrap_or_default();
    let apt_options = apt_options.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect();
    Some(BuildOptions { mirror, apt_options, ..BuildOptions::default() })
}

fn recipe(more: &str) -> Recipe {
    let text = format!(
        "name = 'small'\nsuite = 'trixie'\n{more}\n\
         [user]\nname = 'user'\nuid = 1234\nhome = '/home/user'\npasswordless_sudo = true"
    );
    Recipe::parse(&text).expect("valid")
}

/// What mmdebstrap has in the directory for temporary files that it uses unless it is told another.
fn temporary_files() -> Vec<std::ffi::OsString> {
    let entries = std::fs::read_dir(std::env::temp_dir()).expect("readable");
    let names = entries.map(|entry| entry.expect("readable").file_name());
    names.filter(|name| name.as_encoded_bytes().starts_with(b"mmdebstrap")).collect()
}

/// A certificate that nobody has the key of: `update-ca-certificates` reads it, nothing more.
const CERTIFICATE: &str = include_str!("test-ca.pem");

#[tokio::test]
async fn a_small_recipe_becomes_a_system_without_traces_of_the_host() {
    let Some(mut options) = options("a_small_recipe_becomes_a_system_without_traces_of_the_host") else { return };
    let parent = tempfile::tempdir().expect("a directory");
    let ca = parent.path().join("ca.pem");
    std::fs::write(&ca, CERTIFICATE).expect("written");
    options.host_ca_certificates = vec![ca];
    let recipe = recipe(
        "packages = ['sudo']\nrun = ['echo \"$COLOUR\" > /etc/colour', 'cat > /etc/input']\n\
         working_directory = '/work'\nenv = { COLOUR = 'deep blue' }",
    );
    let dest = parent.path().join("small");

    let mut seen: Vec<Progress> = Vec::new();
    let metadata = build_rootfs(&recipe, &options, &dest, |progress| seen.push(progress)).await.expect("built");

    let steps: Vec<Step> = seen.iter().map(|progress| progress.step).collect();
    assert!(steps.is_sorted(), "steps go forward");
    assert!(seen.is_sorted_by_key(|progress| progress.percent), "percents do not fall");
    for step in
        [Step::Prepare, Step::Index, Step::Essential, Step::Download, Step::Install, Step::Customize, Step::Done]
    {
        assert!(steps.contains(&step), "{step:?} was reported");
    }

    let rootfs = rootfs_of(&dest);
    let read = |name: &str| std::fs::read_to_string(rootfs.join(name)).expect(name);
    assert_eq!(read("etc/colour"), "deep blue\n");
    assert_eq!(read("etc/input"), "", "commands read nothing of ours");
    assert_eq!((read("etc/hostname"), read("etc/machine-id")), ("localhost\n".into(), String::new()));
    assert_eq!(read("etc/resolv.conf"), "");
    assert!(read("etc/apt/sources.list.d/debian.sources").contains(&format!("URIs: {}\n", options.mirror)));
    assert!(!rootfs.join("etc/apt/sources.list").exists());
    assert!(read("etc/passwd").contains("\nuser:x:1234:1234::/home/user:/bin/bash\n"));
    assert!(read("etc/sudoers.d/90-belljar").ends_with("\nuser ALL=(ALL:ALL) NOPASSWD: ALL\n"));
    assert!(read("usr/bin/sudo").contains("/.belljar/sudo"));
    assert!(read("etc/environment").contains("COLOUR=\"deep blue\"\nCURL_CA_BUNDLE="));
    let certificate = CERTIFICATE.lines().nth(1).expect("a certificate has lines");
    assert!(read("etc/ssl/certs/ca-certificates.crt").contains(certificate));
    assert_eq!(std::fs::read_dir(rootfs.join("dev")).expect("a mount point").count(), 0);
    let mode = |name: &str| std::fs::metadata(rootfs.join(name)).expect(name).permissions().mode() & 0o7777;
    assert_eq!((mode(""), mode("tmp"), mode(".belljar")), (0o755, 0o1777, 0o755));
    assert_eq!((mode("usr/bin/sudo"), mode("usr/bin/sudo.distrib") & 0o4000), (0o755, 0o4000));
    let work = std::fs::metadata(rootfs.join("work")).expect("the working directory");
    assert_eq!((work.uid(), work.gid()), (1234, 1234));

    assert_eq!(metadata.env["COLOUR"], "deep blue");
    assert_eq!(metadata.env["PIP_CERT"], "/etc/ssl/certs/ca-certificates.crt");
    assert_eq!(metadata.recipe_digest, recipe.digest());
    assert!(metadata.packages.contains_key("sudo") && metadata.host_ca_digest.is_some());
    assert!(metadata.rootfs_bytes > 50_000_000 && metadata.rootfs_entries > 1000);
    assert_eq!(BuildMetadata::load(&dest).expect("readable"), metadata);
    assert_eq!(std::fs::read_dir(&dest).expect("there").count(), 2, "rootfs and build.json");
    assert!(!parent.path().join("small.partial").exists());

    let again = build_rootfs(&recipe, &options, &dest, |_| {}).await.expect_err("there is one");
    assert!(matches!(again, BuildError::AlreadyExists { .. }));
}

#[tokio::test]
async fn a_killed_build_leaves_only_its_partial_directory() {
    let Some(options) = options("a_killed_build_leaves_only_its_partial_directory") else { return };
    let parent = tempfile::tempdir().expect("a directory");
    let dest = parent.path().join("small");
    let temporary_before = temporary_files();
    let recipe = recipe("packages = ['sudo']");
    let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
    let build = tokio::spawn({
        let dest = dest.clone();
        async move { build_rootfs(&recipe, &options, &dest, |progress| drop(sender.send(progress))).await }
    });
    // By then /proc, /sys and /dev are mounted in the new system.
    while receiver.recv().await.expect("the build goes on").step < Step::Download {}
    assert!(remove_abandoned(parent.path()).expect("readable").is_empty(), "a running build is not abandoned");
    build.abort();
    assert!(build.await.expect_err("aborted").is_cancelled());

    // It may take the kernel a moment; then nobody holds the lock and it can be removed.
    let mut removed = Vec::new();
    for _ in 0..100 {
        removed = remove_abandoned(parent.path()).expect("nothing is mounted in it");
        if !removed.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(removed, [parent.path().join("small.partial")]);
    assert_eq!(std::fs::read_dir(parent.path()).expect("there").count(), 0);
    assert_eq!(temporary_files(), temporary_before);
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("readable");
    assert!(!mounts.contains(&parent.path().display().to_string()));
}

#[tokio::test]
async fn a_failing_build_names_the_cause_and_leaves_nothing() {
    let Some(options) = options("a_failing_build_names_the_cause_and_leaves_nothing") else { return };
    let parent = tempfile::tempdir().expect("a directory");
    let dest = parent.path().join("small");

    let unreachable =
        BuildOptions { mirror: "http://127.0.0.1:1/debian".parse().expect("a mirror"), ..options.clone() };
    let error = build_rootfs(&recipe("packages = ['sudo']"), &unreachable, &dest, |_| {}).await.expect_err("no mirror");
    assert!(matches!(error, BuildError::MirrorUnreachable { .. }), "{error}");

    let missing = BuildOptions { host_ca_certificates: vec!["/nowhere.pem".into()], ..options.clone() };
    let error = build_rootfs(&recipe("packages = ['sudo']"), &missing, &dest, |_| {}).await.expect_err("no file");
    assert!(matches!(error, BuildError::Certificates(_)), "{error}");

    let hasty = BuildOptions { timeout: Duration::from_millis(300), ..options };
    let error = build_rootfs(&recipe("packages = ['sudo']"), &hasty, &dest, |_| {}).await.expect_err("too short");
    assert!(matches!(error, BuildError::TimedOut { .. }), "{error}");
    assert_eq!(std::fs::read_dir(parent.path()).expect("there").count(), 0);
}
