//! What a base copy consists of: its files, each as a list of extents, and what a server needs to start from them.

use std::path::Path;

use pgtandem_proto::message::{EXTENT_BYTES, Lsn};
use serde::{Deserialize, Serialize};

use super::error::ArchiveError;
use super::file;
use super::names::Hash;
use crate::sync::rules;
use crate::sync::scan::FILES_MAX;
use crate::sync::wal::segment_bytes_valid;

/// Longest manifest, bytes: about 70 for each MiB of the server.
pub const MANIFEST_BYTES_MAX: u64 = 1 << 30;
/// Of the layout below.
const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    version: u32,
    pub node: String,
    pub stream: String,
    pub system_identifier: u64,
    pub timeline: u32,
    pub wal_segment_bytes: u32,
    /// `server_version_num`.
    pub version_num: u32,
    pub start: u64,
    pub stop: u64,
    /// Microseconds since 1970: what was committed by then is in it, or in the WAL up to its stop.
    pub ended_us: u64,
    /// The node was the leader.
    pub leads: bool,
    pub backup_label: String,
    pub tablespace_map: String,
    /// Some of the server's settings, for a restored server that has none of its own.
    pub settings: Vec<(String, String)>,
    /// Pages of the server whose checksum was wrong in every read; some of them are named.
    pub damaged: Vec<String>,
    pub damaged_count: u64,
    /// Directories before what they contain.
    pub files: Vec<CopiedFile>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopiedFile {
    /// Relative to the data directory.
    pub path: String,
    pub directory: bool,
    pub mode: u32,
    /// Of `pg_tblspc/<oid>`: where the tablespace was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tablespace: Option<String>,
    /// Each begins at a multiple of 1 MiB.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extents: Vec<CopiedExtent>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopiedExtent {
    pub bytes: u32,
    /// BLAKE3 of it, hexadecimal; None: zeros.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "hexadecimal")]
    pub hash: Option<Hash>,
}

mod hexadecimal {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::archive::names::Hash;

    #[allow(clippy::ref_option, reason = "the form that serde asks for")]
    pub fn serialize<S: Serializer>(hash: &Option<Hash>, serializer: S) -> Result<S::Ok, S::Error> {
        match hash {
            Some(hash) => serializer.serialize_str(&blake3::Hash::from_bytes(*hash).to_hex()),
            None => serializer.serialize_none(),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Hash>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        let parse = |text: String| blake3::Hash::from_hex(text).map(|hash| *hash.as_bytes()).map_err(D::Error::custom);
        text.map(parse).transpose()
    }
}

/// What a manifest says of its server.
pub struct About {
    pub node: String,
    pub stream: String,
    pub system_identifier: u64,
    pub timeline: u32,
    pub wal_segment_bytes: u32,
    pub version_num: u32,
    pub leads: bool,
    pub settings: Vec<(String, String)>,
}

impl Manifest {
    #[must_use]
    pub fn new(about: About, start: Lsn, files: Vec<CopiedFile>) -> Manifest {
        Manifest {
            version: VERSION,
            node: about.node,
            stream: about.stream,
            system_identifier: about.system_identifier,
            timeline: about.timeline,
            wal_segment_bytes: about.wal_segment_bytes,
            version_num: about.version_num,
            start: start.0,
            stop: start.0,
            ended_us: 0,
            leads: about.leads,
            backup_label: String::new(),
            tablespace_map: String::new(),
            settings: about.settings,
            damaged: Vec::new(),
            damaged_count: 0,
            files,
        }
    }

    pub fn encode(&self) -> Result<Vec<u8>, ArchiveError> {
        serde_json::to_vec(self)
            .map_err(|error| ArchiveError::refused(format!("a manifest can not be written: {error}"), "report this"))
    }

    /// The one in the file at `path`, checked: what it names stays within a data directory.
    pub fn load(path: &Path) -> Result<Manifest, ArchiveError> {
        let (_, content) = file::read(path, MANIFEST_BYTES_MAX)?;
        Manifest::decode(&content).map_err(|why| ArchiveError::damaged(path, why))
    }

    pub fn decode(content: &[u8]) -> Result<Manifest, String> {
        let manifest: Manifest = serde_json::from_slice(content).map_err(|error| error.to_string())?;
        if manifest.version != VERSION {
            return Err(format!("it is of version {}, and this program reads version {VERSION}", manifest.version));
        }
        if !segment_bytes_valid(manifest.wal_segment_bytes)
            || manifest.files.len() > FILES_MAX
            || manifest.start > manifest.stop
        {
            return Err("its numbers make no sense".into());
        }
        for file in &manifest.files {
            if let Some(fault) = rules::path_fault(&file.path) {
                return Err(format!("it names a file {:?}: {fault}", file.path));
            }
            if file.extents.iter().any(|extent| extent.bytes as usize > EXTENT_BYTES) {
                return Err(format!("an extent of {} is too long", file.path));
            }
        }
        Ok(manifest)
    }

    /// The extents that it needs.
    pub fn hashes(&self) -> impl Iterator<Item = Hash> + '_ {
        self.files.iter().flat_map(|file| &file.extents).filter_map(|extent| extent.hash)
    }

    /// Of all files.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.files.iter().flat_map(|file| &file.extents).map(|extent| u64::from(extent.bytes)).sum()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::archive) fn manifest(files: Vec<CopiedFile>) -> Manifest {
        let about = About {
            node: "a".into(),
            stream: "00000001-0011223344556677".into(),
            system_identifier: u64::MAX,
            timeline: 1,
            wal_segment_bytes: 16 << 20,
            version_num: 150_018,
            leads: true,
            settings: vec![("max_connections".into(), "200".into())],
        };
        Manifest::new(about, Lsn(0x200_0028), files)
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written() {
        let extents = vec![CopiedExtent { bytes: 1 << 20, hash: None }, CopiedExtent { bytes: 5, hash: Some([7; 32]) }];
        let file = CopiedFile { path: "base/5/1259".into(), directory: false, mode: 0o600, tablespace: None, extents };
        let manifest = manifest(vec![file]);
        assert_eq!(Manifest::decode(&manifest.encode().unwrap()), Ok(manifest.clone()));
        assert_eq!(manifest.hashes().count(), 1);
    }

    #[test]
    fn a_manifest_that_leads_elsewhere_is_refused() {
        for path in ["../x", "/etc/passwd", "pg_wal/000000010000000000000001", "standby.signal"] {
            let file =
                CopiedFile { path: path.into(), directory: false, mode: 0o600, tablespace: None, extents: Vec::new() };
            assert!(Manifest::decode(&manifest(vec![file]).encode().unwrap()).is_err(), "{path}");
        }
        let long = vec![CopiedExtent { bytes: u32::MAX, hash: None }];
        let file =
            CopiedFile { path: "base/5/1".into(), directory: false, mode: 0o600, tablespace: None, extents: long };
        assert!(Manifest::decode(&manifest(vec![file]).encode().unwrap()).is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_content_makes_it_panic(content in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let _ = Manifest::decode(&content);
        }
    }
}
