//! Builds the templates that belljar ships, and publishes them.
//!
//! ```text
//! recipe ──image::build_rootfs──▶ templates/BUILD/ ──publish──▶ record ──▶ sandboxes start from it
//! ```
//!
//! A build becomes visible with its record, which is written last. What a build that broke off leaves behind has no
//! record and is removed by the next one.

use std::collections::HashSet;
use std::path::PathBuf;

use belljar_core::id::TemplateId;
use belljar_core::limits::Resources;
use belljar_runtime::image::{self, BuildError, BuildOptions, Progress, Recipe, RecipeError};
use belljar_store::{Store, StoreError, TemplateRecord};
use tracing::{info, warn};

use crate::state_dir::StateDir;

/// The recipes inside the binary.
const RECIPES: [(&str, &str); 1] = [("base", include_str!("../../../../templates/base/template.toml"))];

/// A template could not be built or published.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PublishError {
    #[error("there is no recipe `{name}`; belljar ships {known}")]
    UnknownRecipe { name: String, known: String },
    #[error("the recipe can't be read")]
    Recipe(#[from] RecipeError),
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error("the template can't be written down")]
    Store(#[from] StoreError),
    #[error("{path} can't be cleared away")]
    Clear { path: PathBuf, source: std::io::Error },
}

/// What is known of a template that is ready.
#[derive(Debug)]
pub(crate) struct Published {
    pub(crate) record: TemplateRecord,
    pub(crate) rootfs_bytes: u64,
    /// The same recipe with the same certificates had been built before, so nothing was done.
    pub(crate) unchanged: bool,
}

/// Builds a shipped template and points its name at the new build. Does nothing if the present build is of the same
/// recipe and certificates, unless `force`.
pub(crate) async fn build_and_publish(
    name: &str,
    state: &StateDir,
    store: &Store,
    options: &BuildOptions,
    resources: Resources,
    force: bool,
    progress: impl FnMut(Progress) + Send,
) -> Result<Published, PublishError> {
    let recipe = Recipe::parse(recipe_text(name)?)?;
    let known = store.templates().await?.into_iter().find(|template| template.name == recipe.name);
    if let Some(record) = known.as_ref().filter(|_| !force) {
        let present = image::BuildMetadata::load(&state.templates().join(&record.build_id));
        let wanted = (recipe.digest(), options.host_ca_digest().map_err(BuildError::Certificates)?);
        if let Ok(present) = present.as_ref()
            && (present.recipe_digest.clone(), present.host_ca_digest.clone()) == wanted
        {
            // What the files are is one thing, what sandboxes get beside them another.
            let record = TemplateRecord { resources, ..record.clone() };
            store.publish_template(&record).await?;
            return Ok(Published { record, rootfs_bytes: present.rootfs_bytes, unchanged: true });
        }
    }
    // A build has an id of its own, so that sandboxes of the last one keep their files.
    let build_id = TemplateId::generate().to_string();
    let metadata = image::build_rootfs(&recipe, options, &state.templates().join(&build_id), progress).await?;
    let record = TemplateRecord {
        id: known.map_or_else(TemplateId::generate, |known| known.id),
        team_id: None,
        name: recipe.name.clone(),
        build_id,
        resources,
        env: metadata.env,
        user: metadata.user.name,
        workdir: metadata.working_directory,
        updated_ms: belljar_store::now_ms(),
    };
    let replaced = store.publish_template(&record).await?;
    // A create that read the record a moment ago may still start from the build just replaced; the next build clears
    // it.
    remove_unused_builds(state, store, replaced).await?;
    Ok(Published { record, rootfs_bytes: metadata.rootfs_bytes, unchanged: false })
}

fn recipe_text(name: &str) -> Result<&'static str, PublishError> {
    let known = || RECIPES.iter().map(|(known, _)| format!("`{known}`")).collect::<Vec<_>>().join(", ");
    RECIPES
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, text)| *text)
        .ok_or_else(|| PublishError::UnknownRecipe { name: name.to_owned(), known: known() })
}

/// Removes builds that neither a template nor a living sandbox needs, and what broken builds left.
async fn remove_unused_builds(state: &StateDir, store: &Store, spared: Option<String>) -> Result<(), PublishError> {
    let mut needed: HashSet<String> = store.templates().await?.into_iter().map(|template| template.build_id).collect();
    needed.extend(spared);
    needed.extend(store.live_sandboxes().await?.into_iter().map(|sandbox| sandbox.build_id));
    let templates = state.templates();
    let clear = |source| PublishError::Clear { path: templates.clone(), source };
    for path in image::remove_abandoned(&templates).map_err(clear)? {
        info!(path = %path.display(), "removed what a broken build left");
    }
    for entry in std::fs::read_dir(&templates).map_err(clear)? {
        let entry = entry.map_err(clear)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // A name with a dot is a build under way in another process.
        if needed.contains(&name) || name.contains('.') {
            continue;
        }
        match std::fs::remove_dir_all(entry.path()) {
            Ok(()) => info!(build_id = name, "removed an unused build"),
            Err(error) => warn!(build_id = name, error = &error as &dyn std::error::Error, "an unused build stays"),
        }
    }
    Ok(())
}
