//! Where a build stands, read from the lines that mmdebstrap, apt and dpkg print.

/// One thing that happened during a build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    pub step: Step,
    /// Of the whole build; never falls. An estimate: by packages counted, not by time.
    pub percent: u8,
    /// What a program printed, for whoever wants to see everything.
    pub line: Option<String>,
}

/// The stages of a build, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// Checking what is needed, clearing away an earlier attempt.
    Prepare,
    /// Reading the mirrors' package lists.
    Index,
    /// Fetching and unpacking the essential packages.
    Essential,
    /// Fetching the recipe's packages.
    Download,
    /// Unpacking and configuring them.
    Install,
    /// Making the user, trusting certificates, running the recipe's commands.
    Customize,
    /// Removing traces of this machine, measuring, writing to disk.
    Finish,
    /// The template can be used.
    Done,
}

impl Step {
    /// A few words for a person.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Prepare => "preparing",
            Self::Index => "reading package lists",
            Self::Essential => "installing the essential packages",
            Self::Download => "downloading packages",
            Self::Install => "installing packages",
            Self::Customize => "setting up the system",
            Self::Finish => "finishing",
            Self::Done => "done",
        }
    }

    /// The percent at which the step begins; the shares are the times measured for the base template.
    fn begins_at(self) -> u8 {
        match self {
            Self::Prepare => 0,
            Self::Index => 1,
            Self::Essential => 5,
            Self::Download => 28,
            Self::Install => 40,
            Self::Customize => 92,
            Self::Finish => 96,
            Self::Done => 100,
        }
    }
}

impl Progress {
    pub(super) fn at(step: Step) -> Self {
        Self { step, percent: step.begins_at(), line: None }
    }
}

/// Follows a build by its output.
#[derive(Debug)]
pub(super) struct Tracker {
    step: Step,
    /// Packages of the present apt run, when apt has said how many.
    packages: usize,
    done: usize,
}

impl Tracker {
    pub(super) fn new() -> Self {
        Self { step: Step::Index, packages: 0, done: 0 }
    }

    pub(super) fn step(&self) -> Step {
        self.step
    }

    /// Takes in one line of output.
    pub(super) fn read(&mut self, line: String) -> Progress {
        if let Some(message) = line.strip_prefix("I: ") {
            self.read_stage(message);
        } else if line.starts_with(super::mmdebstrap::CUSTOMIZE_MARK) {
            self.enter(Step::Customize);
        } else if let Some(count) = newly_installed(&line) {
            self.packages = count;
            self.done = 0;
        } else if self.step == Step::Download && line.starts_with("Fetched ") {
            self.enter(Step::Install);
        } else if self.counts(&line) {
            self.done += 1;
        }
        Progress { step: self.step, percent: self.percent(), line: Some(line) }
    }

    fn read_stage(&mut self, message: &str) {
        if message.starts_with("downloading packages") {
            self.enter(Step::Essential);
        } else if message.starts_with("installing remaining packages") {
            self.enter(Step::Download);
        }
    }

    fn enter(&mut self, step: Step) {
        if step > self.step {
            self.step = step;
            self.done = 0;
        }
    }

    /// Whether the line reports one more unit of the present step's work: a package fetched, or unpacked, or set up.
    fn counts(&self, line: &str) -> bool {
        match self.step {
            Step::Download => line.starts_with("Get:"),
            Step::Essential | Step::Install => line.starts_with("Unpacking ") || line.starts_with("Setting up "),
            Step::Prepare | Step::Index | Step::Customize | Step::Finish | Step::Done => false,
        }
    }

    fn percent(&self) -> u8 {
        let (units, end) = match self.step {
            Step::Essential => (2 * self.packages, Step::Download.begins_at()),
            Step::Download => (self.packages, Step::Install.begins_at()),
            Step::Install => (2 * self.packages, Step::Customize.begins_at()),
            Step::Prepare | Step::Index | Step::Customize | Step::Finish | Step::Done => return self.step.begins_at(),
        };
        let begin = self.step.begins_at();
        let share = usize::from(end - begin) * self.done.min(units) / units.max(1);
        begin + u8::try_from(share).expect("a share of at most 100 percent")
    }
}

/// The 528 of "0 upgraded, 528 newly installed, 0 to remove and 0 not upgraded."
fn newly_installed(line: &str) -> Option<usize> {
    line.split(", ").find_map(|part| part.strip_suffix(" newly installed"))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_is_followed_from_its_output() {
        let lines = [
            ("I: running apt-get update...", Step::Index, 1),
            ("Get:1 http://deb.debian.org/debian trixie InRelease [140 kB]", Step::Index, 1),
            ("I: downloading packages with apt...", Step::Essential, 5),
            ("0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded.", Step::Essential, 5),
            ("I: installing essential packages...", Step::Essential, 5),
            ("Unpacking dash (0.5.12-12) ...", Step::Essential, 10),
            ("Unpacking bash (5.2.37-2+b10) ...", Step::Essential, 16),
            ("Setting up dash (0.5.12-12) ...", Step::Essential, 22),
            ("I: installing remaining packages inside the chroot...", Step::Download, 28),
            ("0 upgraded, 1 newly installed, 0 to remove and 0 not upgraded.", Step::Download, 28),
            ("Get:1 http://deb.debian.org/debian trixie/main amd64 less amd64 668-1 [161 kB]", Step::Download, 40),
            ("Fetched 161 kB in 0s (9 MB/s)", Step::Install, 40),
            ("Unpacking less (668-1) ...", Step::Install, 66),
            ("Setting up less (668-1) ...", Step::Install, 92),
            ("Setting up one that apt did not announce (1) ...", Step::Install, 92),
            ("belljar: creating the user user", Step::Customize, 92),
            ("I: cleaning package lists and apt cache...", Step::Customize, 92),
        ];
        let mut tracker = Tracker::new();
        for (line, step, percent) in lines {
            let progress = tracker.read(line.to_owned());
            assert_eq!((progress.step, progress.percent, progress.line.as_deref()), (step, percent, Some(line)));
        }
    }

    #[test]
    fn counts_are_read_only_from_apts_summary() {
        assert_eq!(newly_installed("3 upgraded, 41 newly installed, 0 to remove and 0 not upgraded."), Some(41));
        assert_eq!(newly_installed("many, newly installed"), None);
        assert_eq!(newly_installed(""), None);
    }
}
