//! Templates and the build each one starts from.

use std::collections::BTreeMap;

use belljar_core::id::{TeamId, TemplateId};
use belljar_core::limits::Resources;
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use crate::{Store, StoreError, corrupt, now_ms};

/// One template with its finished build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateRecord {
    pub id: TemplateId,
    /// The owner; none for the templates that belljar ships.
    pub team_id: Option<TeamId>,
    pub name: String,
    /// Names the directory that holds the root filesystem.
    pub build_id: String,
    pub resources: Resources,
    pub env: BTreeMap<String, String>,
    pub user: String,
    pub workdir: String,
    pub updated_ms: i64,
}

impl Store {
    /// Makes a template, or points an existing one of the same name at a new build. Answers the build it replaced.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn publish_template(&self, template: &TemplateRecord) -> Result<Option<String>, StoreError> {
        let mut transaction = self.pool.begin().await?;
        let replaced: Option<String> = sqlx::query_scalar("SELECT build_id FROM templates WHERE name = ?")
            .bind(&template.name)
            .fetch_optional(&mut *transaction)
            .await?;
        let now = now_ms();
        sqlx::query(
            "INSERT INTO templates (id, team_id, name, build_id, vcpus, memory_mib, disk_mib, processes, env, user, \
             workdir, created_ms, updated_ms) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) \
             ON CONFLICT (name) DO UPDATE SET build_id = excluded.build_id, vcpus = excluded.vcpus, \
             memory_mib = excluded.memory_mib, disk_mib = excluded.disk_mib, processes = excluded.processes, \
             env = excluded.env, user = excluded.user, workdir = excluded.workdir, updated_ms = excluded.updated_ms",
        )
        .bind(template.id.as_str())
        .bind(template.team_id.as_ref().map(TeamId::as_str))
        .bind(&template.name)
        .bind(&template.build_id)
        .bind(template.resources.vcpus)
        .bind(template.resources.memory_mib)
        .bind(template.resources.disk_mib)
        .bind(template.resources.processes)
        .bind(json(&template.env))
        .bind(&template.user)
        .bind(&template.workdir)
        .bind(now)
        .bind(now)
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(replaced)
    }

    /// The template of that id or name, if the team may use it.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn template_for_team(
        &self,
        id_or_name: &str,
        team_id: &TeamId,
    ) -> Result<Option<TemplateRecord>, StoreError> {
        let row =
            sqlx::query("SELECT * FROM templates WHERE (id = ?1 OR name = ?1) AND (team_id IS NULL OR team_id = ?2)")
                .bind(id_or_name)
                .bind(team_id.as_str())
                .fetch_optional(&self.pool)
                .await?;
        row.as_ref().map(template_from_row).transpose()
    }

    /// All templates, by name.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn templates(&self) -> Result<Vec<TemplateRecord>, StoreError> {
        let rows = sqlx::query("SELECT * FROM templates ORDER BY name").fetch_all(&self.pool).await?;
        rows.iter().map(template_from_row).collect()
    }
}

fn template_from_row(row: &SqliteRow) -> Result<TemplateRecord, StoreError> {
    let id: String = row.try_get("id")?;
    let what = format!("template {id}");
    let team_id: Option<String> = row.try_get("team_id")?;
    Ok(TemplateRecord {
        team_id: team_id.map(|text| text.parse()).transpose().map_err(|why| corrupt(&what, why))?,
        name: row.try_get("name")?,
        build_id: row.try_get("build_id")?,
        resources: resources_from_row(row)?,
        env: from_json(row.try_get("env")?, &what)?,
        user: row.try_get("user")?,
        workdir: row.try_get("workdir")?,
        updated_ms: row.try_get("updated_ms")?,
        id: id.parse().map_err(|why| corrupt(&what, why))?,
    })
}

pub(crate) fn resources_from_row(row: &SqliteRow) -> Result<Resources, StoreError> {
    Ok(Resources {
        vcpus: row.try_get("vcpus")?,
        memory_mib: row.try_get("memory_mib")?,
        disk_mib: row.try_get("disk_mib")?,
        processes: row.try_get("processes")?,
    })
}

pub(crate) fn json(map: &BTreeMap<String, String>) -> String {
    serde_json::to_string(map).expect("a map of strings always has a JSON form")
}

pub(crate) fn from_json(text: String, what: &str) -> Result<BTreeMap<String, String>, StoreError> {
    serde_json::from_str(&text).map_err(|why| corrupt(what, why))
}
