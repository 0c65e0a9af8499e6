//! The call of mmdebstrap: its arguments, the files its customize hook reads, and its output.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::certificates::HostCertificates;
use super::diagnosis::{KEPT_LINES, diagnose};
use super::progress::{Progress, Tracker};
use super::recipe::Recipe;
use super::staging::Staging;
use super::supervisor::Supervised;
use super::{BuildError, BuildOptions, Mirror};

pub(super) const CUSTOMIZE_SCRIPT: &str = include_str!("customize.sh");
/// How the customize script marks its lines, and the one about a failed command.
pub(super) const CUSTOMIZE_MARK: &str = "belljar: ";
pub(super) const COMMAND_FAILED_MARK: &str = "belljar: failed: ";

/// Where programs are looked for, on the host and in the new system while it is built.
const SYSTEM_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What of our environment reaches the build: how to get out of this network. Everything else, keys and tokens
/// included, is nothing to a package's script.
const PROXY_VARIABLES: [&str; 8] =
    ["http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"];

/// Debian's signing keys, under the name of Debian 13 and under the older one.
const KEYRINGS: [&str; 2] =
    ["/usr/share/keyrings/debian-archive-keyring.pgp", "/usr/share/keyrings/debian-archive-keyring.gpg"];

/// Manuals, translations and other things to read: a third of what Debian would install. Licences stay. It holds for
/// packages installed in a sandbox too.
const DPKG_OPTIONS: [&str; 10] = [
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/lintian/*",
    "path-exclude=/usr/share/locale/*",
    "path-include=/usr/share/locale/locale.alias",
    "path-exclude=/usr/share/groff/*",
    "path-exclude=/usr/share/linda/*",
    // Writing to disk is the builder's matter (one `syncfs` at the end), and a sandbox's disk does not outlive it.
    "force-unsafe-io",
];

/// For the build only; an unreachable mirror is told within two minutes.
const APT_OPTIONS: [&str; 4] = [
    "Acquire::Retries \"3\";",
    "Acquire::http::Timeout \"30\";",
    "Acquire::https::Timeout \"30\";",
    "Acquire::Languages \"none\";",
];

/// What stays in the new system: translated descriptions are a third of an `apt-get update`.
const APT_CONF_INSIDE: &str = "Acquire::Languages \"none\";\n";

/// Fills `staging.rootfs()` by the recipe. `environment` is that of the recipe's commands.
pub(super) async fn run(
    recipe: &Recipe,
    options: &BuildOptions,
    certificates: &HostCertificates,
    environment: &BTreeMap<String, String>,
    staging: &Staging,
    progress: &mut (impl FnMut(Progress) + Send),
) -> Result<(), BuildError> {
    for (program, package) in [("mmdebstrap", "mmdebstrap"), ("unshare", "util-linux"), ("chroot", "coreutils")] {
        if !is_installed(program) {
            return Err(BuildError::MissingProgram { program, package });
        }
    }
    let keyring = KEYRINGS.into_iter().find(|path| Path::new(path).exists()).ok_or(BuildError::MissingKeyring)?;
    write_inputs(recipe, certificates, environment, &staging.inputs())?;

    let arguments = arguments(recipe, options, certificates, keyring, staging);
    let supervised = Supervised::start(&arguments, &environment_of_build(recipe, staging), staging.lock_handle()?)
        .map_err(BuildError::file("start", "unshare"))?;
    follow(supervised, options, staging, progress).await
}

async fn follow(
    mut supervised: Supervised,
    options: &BuildOptions,
    staging: &Staging,
    progress: &mut (impl FnMut(Progress) + Send),
) -> Result<(), BuildError> {
    let deadline = tokio::time::Instant::now() + options.timeout;
    let io_error = || BuildError::file("follow the build in", staging.directory());
    let mut tracker = Tracker::new();
    let mut kept = VecDeque::with_capacity(KEPT_LINES);
    loop {
        let line = match tokio::time::timeout_at(deadline, supervised.line()).await {
            Ok(line) => line.map_err(io_error())?,
            Err(_) => {
                supervised.stop().await.map_err(io_error())?;
                return Err(BuildError::TimedOut { limit: options.timeout });
            }
        };
        let Some(line) = line else { break };
        let line = options.mirror.redact(line);
        let line = options.security_mirror.as_ref().map_or(line.clone(), |mirror| mirror.redact(line));
        tracing::debug!(step = tracker.step().describe(), "{line}");
        if kept.len() == KEPT_LINES {
            kept.pop_front();
        }
        kept.push_back(line.clone());
        progress(tracker.read(line));
    }
    let status = supervised.wait().await.map_err(io_error())?;
    if status.success() {
        return Ok(());
    }
    Err(diagnose(kept.make_contiguous(), status.to_string(), &options.mirror, staging.directory()))
}

fn arguments(
    recipe: &Recipe,
    options: &BuildOptions,
    certificates: &HostCertificates,
    keyring: &str,
    staging: &Staging,
) -> Vec<OsString> {
    // `passwd` makes the user's account; the rest of the recipe decides what else is there.
    let mut packages = vec!["passwd"];
    if !certificates.is_empty() {
        packages.push("ca-certificates");
    }
    packages.extend(recipe.packages.iter().map(String::as_str));

    let mut arguments: Vec<OsString> =
        ["mmdebstrap", "--mode=root", "--format=directory", "--verbose"].map(OsString::from).into();
    arguments.push(format!("--variant={}", recipe.variant.as_str()).into());
    arguments.push(format!("--include={}", packages.join(",")).into());
    arguments.extend(DPKG_OPTIONS.iter().map(|option| format!("--dpkgopt={option}").into()));
    arguments.extend(APT_OPTIONS.iter().map(|option| format!("--aptopt={option}").into()));
    arguments.extend(options.apt_options.iter().map(|option| format!("--aptopt={}", apt_conf_line(option)).into()));
    let mut hook = OsString::from("--customize-hook=");
    hook.push(staging.inputs().join("customize"));
    arguments.push(hook);
    arguments.push(recipe.suite.clone().into());
    arguments.push(staging.rootfs().into());
    let sources = sources(recipe, &options.mirror, options.security_mirror.as_ref(), Mirror::with_credentials);
    arguments.extend(
        sources
            .into_iter()
            .map(|(address, suite)| OsString::from(format!("deb [signed-by={keyring}] {address} {suite} main"))),
    );
    arguments
}

/// Address and suite of every source: the suite, its updates, and its security fixes.
pub(super) fn sources(
    recipe: &Recipe,
    mirror: &Mirror,
    security_mirror: Option<&Mirror>,
    address: impl Fn(&Mirror) -> String,
) -> Vec<(String, String)> {
    let suite = &recipe.suite;
    let mut sources = vec![(address(mirror), suite.clone())];
    // Debian's development branch gets both by itself.
    if !matches!(suite.as_str(), "sid" | "unstable") {
        let security = security_mirror.cloned().unwrap_or_else(|| mirror.security());
        sources.push((address(mirror), format!("{suite}-updates")));
        sources.push((address(&security), format!("{suite}-security")));
    }
    sources
}

/// apt.conf's syntax for an option given either as there or, as on apt's command line, as `Key=value`.
fn apt_conf_line(option: &str) -> String {
    match option.split_once('=') {
        Some((key, value)) if !key.contains(char::is_whitespace) => format!("{key} \"{value}\";"),
        _ => option.to_owned(),
    }
}

fn environment_of_build(recipe: &Recipe, staging: &Staging) -> Vec<(&'static str, OsString)> {
    let proxies = PROXY_VARIABLES.into_iter().filter_map(|name| Some((name, std::env::var_os(name)?)));
    let mut environment: Vec<(&'static str, OsString)> = proxies.collect();
    environment.extend([
        ("PATH", SYSTEM_PATH.into()),
        ("HOME", "/root".into()),
        // Not /tmp: mmdebstrap's temporary files shall be part of what a killed build leaves, and so be removed with
        // it.
        ("TMPDIR", staging.inputs().join("tmp").into()),
        ("LC_ALL", "C.UTF-8".into()),
        ("DEBIAN_FRONTEND", "noninteractive".into()),
        ("BELLJAR_INPUTS", staging.inputs().into()),
        ("BELLJAR_USER", recipe.user.name.clone().into()),
        ("BELLJAR_UID", recipe.user.uid.to_string().into()),
        ("BELLJAR_HOME", recipe.user.home.clone().into()),
        ("BELLJAR_WORKING_DIRECTORY", recipe.working_directory().into()),
        ("BELLJAR_SUDO", if recipe.user.passwordless_sudo { "yes".into() } else { "no".into() }),
    ]);
    environment
}

fn write_inputs(
    recipe: &Recipe,
    certificates: &HostCertificates,
    environment: &BTreeMap<String, String>,
    inputs: &Path,
) -> Result<(), BuildError> {
    create_directory(&inputs.join("run"))?;
    create_directory(&inputs.join("tmp"))?;
    write(inputs.join("customize"), CUSTOMIZE_SCRIPT, 0o755)?;
    write(inputs.join("apt.conf"), APT_CONF_INSIDE, 0o644)?;
    write(inputs.join("sudoers"), &sudoers(&recipe.user.name, environment), 0o440)?;
    let lines: String = environment.iter().map(|(name, value)| format!("{name}=\"{value}\"\n")).collect();
    write(inputs.join("environment"), &lines, 0o644)?;
    for (index, command) in recipe.run.iter().enumerate() {
        write(inputs.join("run").join(format!("{index:03}.sh")), &script(command, environment), 0o644)?;
    }
    if !certificates.is_empty() {
        create_directory(&inputs.join("certificates"))?;
    }
    for (index, block) in certificates.blocks().iter().enumerate() {
        write(inputs.join("certificates").join(format!("{index:03}.crt")), block, 0o644)?;
    }
    Ok(())
}

/// Root without a password, and with the template's environment: sudo would clear it, and with it what makes `sudo pip`
/// trust the host's CAs. PATH is sudo's own `secure_path`.
fn sudoers(user: &str, environment: &BTreeMap<String, String>) -> String {
    let kept: String = environment
        .keys()
        .filter(|name| *name != "PATH")
        .map(|name| format!("Defaults env_keep += \"{name}\"\n"))
        .collect();
    // Its check of root's account closes every possible descriptor one by one, which takes gVisor a second or two.
    let quick = "Defaults:root !pam_acct_mgmt\n";
    format!("{kept}{quick}{user} ALL=(ALL:ALL) NOPASSWD: ALL\n")
}

/// One command of `run`; its first line, a comment, is how the customize script calls it.
fn script(command: &str, environment: &BTreeMap<String, String>) -> String {
    let title = command.trim().lines().next().unwrap_or_default();
    // A recipe's values hold no quotes and no backslashes, so that these quotes are enough.
    let exports: String = environment.iter().map(|(name, value)| format!("export {name}='{value}'\n")).collect();
    format!("# {title}\n{exports}{command}\n")
}

fn create_directory(path: &Path) -> Result<(), BuildError> {
    std::fs::create_dir_all(path).map_err(BuildError::file("create", path))
}

fn write(path: PathBuf, content: &str, mode: u32) -> Result<(), BuildError> {
    std::fs::write(&path, content)
        .and_then(|()| std::fs::set_permissions(&path, Permissions::from_mode(mode)))
        .map_err(BuildError::file("write", path))
}

fn is_installed(program: &str) -> bool {
    SYSTEM_PATH.split(':').any(|directory| Path::new(directory).join(program).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(suite: &str) -> Recipe {
        let text = format!("name = 'x'\nsuite = '{suite}'\n[user]\nname = 'user'\nuid = 1000\nhome = '/home/user'");
        Recipe::parse(&text).expect("valid")
    }

    #[test]
    fn a_stable_suite_comes_with_its_updates_and_security_fixes() {
        let private: Mirror = "http://u:p@mirror.example/debian".parse().expect("a mirror");
        let expected = [
            ("http://mirror.example/debian", "trixie"),
            ("http://mirror.example/debian", "trixie-updates"),
            ("http://mirror.example/debian-security", "trixie-security"),
        ]
        .map(|(address, suite)| (address.to_owned(), suite.to_owned()));
        assert_eq!(sources(&recipe("trixie"), &private, None, Mirror::to_string), expected);
        let own: Mirror = "http://fixes.example".parse().expect("a mirror");
        assert_eq!(sources(&recipe("trixie"), &private, Some(&own), Mirror::to_string)[2].0, "http://fixes.example");
        assert_eq!(sources(&recipe("sid"), &private, None, Mirror::to_string).len(), 1);
    }

    #[test]
    fn apt_options_are_taken_in_both_forms() {
        assert_eq!(apt_conf_line("Acquire::Check-Date=false"), "Acquire::Check-Date \"false\";");
        assert_eq!(
            apt_conf_line("Acquire::http::Proxy \"http://p:1/?a=b\";"),
            "Acquire::http::Proxy \"http://p:1/?a=b\";"
        );
    }

    #[test]
    fn sudo_keeps_the_templates_environment() {
        let environment =
            BTreeMap::from([("PATH".to_owned(), "/bin".to_owned()), ("PIP_CERT".to_owned(), "x".to_owned())]);
        assert_eq!(
            sudoers("user", &environment),
            "Defaults env_keep += \"PIP_CERT\"\nDefaults:root !pam_acct_mgmt\nuser ALL=(ALL:ALL) NOPASSWD: ALL\n"
        );
    }

    #[test]
    fn a_command_runs_with_the_environment_and_keeps_its_title() {
        let environment = BTreeMap::from([("LANG".to_owned(), "C.UTF-8".to_owned())]);
        let text = script("\n  echo one\necho two", &environment);
        assert_eq!(text, "# echo one\nexport LANG='C.UTF-8'\n\n  echo one\necho two\n");
    }
}
