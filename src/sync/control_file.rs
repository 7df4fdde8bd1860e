//! `pg_control`: whose data a directory holds, and whether a read of it is whole.
//!
//! Pure. The layout differs between major versions only behind the fields that are read here; the CRC is found by
//! trying each place where it can be (`ControlFileData` in `catalog/pg_control.h`, 13 to 18).

/// Where the file is, relative to the data directory.
pub const CONTROL_FILE: &str = "global/pg_control";

/// Bytes that carry the structure; the rest of the file is zeros (`PG_CONTROL_MAX_SAFE_SIZE`).
const STRUCTURE_BYTES_MAX: usize = 512;
/// The structure had 296 bytes in 13 to 17 and grew since; its CRC comes last.
const CRC_OFFSET_MIN: usize = 200;

/// What is read from a whole `pg_control`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlFile {
    pub system_identifier: u64,
    /// `pg_control_version`: 1300 for PostgreSQL 13 to 17.
    pub version: u32,
    /// `catalog_version_no`; a part of the names of directories in tablespaces.
    pub catalog_version: u32,
}

/// The content of `bytes` if its CRC is right; `None` for a torn read or something else.
#[must_use]
pub fn parse(bytes: &[u8]) -> Option<ControlFile> {
    let system_identifier = u64::from_le_bytes(bytes.get(0..8)?.try_into().ok()?);
    let version = u32::from_le_bytes(bytes.get(8..12)?.try_into().ok()?);
    let catalog_version = u32::from_le_bytes(bytes.get(12..16)?.try_into().ok()?);
    let end = bytes.len().min(STRUCTURE_BYTES_MAX);
    let whole = (CRC_OFFSET_MIN..end.saturating_sub(3)).step_by(4).any(|offset| {
        let (Some(body), Some(stored)) = (bytes.get(..offset), bytes.get(offset..offset + 4)) else { return false };
        stored.try_into().is_ok_and(|stored| crc32c::crc32c(body) == u32::from_le_bytes(stored))
    });
    whole.then_some(ControlFile { system_identifier, version, catalog_version })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_control_file_is_not_taken() {
        let mut bytes = vec![0_u8; 8192];
        bytes[..8].copy_from_slice(&7_123_456_789_012_345_678_u64.to_le_bytes());
        bytes[8..12].copy_from_slice(&1300_u32.to_le_bytes());
        bytes[100] = 5;
        assert_eq!(parse(&bytes), None);
        let crc = crc32c::crc32c(&bytes[..288]);
        bytes[288..292].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(parse(&bytes).map(|file| file.system_identifier), Some(7_123_456_789_012_345_678));
        bytes[100] = 6;
        assert_eq!(parse(&bytes), None);
        assert_eq!(parse(&bytes[..9]), None);
    }
}
