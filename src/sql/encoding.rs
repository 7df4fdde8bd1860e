//! Texts in the client's encoding, as strings that can be lexed and parsed.
//!
//! In every encoding that is let in, bytes above 127 are parts of characters that are not ASCII, and all others are ASCII; so where
//! literals, names and operators begin and end can be seen without knowing the characters. In UTF-8 a text is what it is; in any
//! other encoding each byte above 127 stands as the character of that number, and becomes that byte again before a server gets it.
//! So servers convert the client's own bytes, each by PostgreSQL's own tables, and names are the catalog's.

use std::borrow::Cow;

/// Client encodings whose characters may have bytes below 128 after the first (`PG_ENCODING_IS_CLIENT_ONLY` in PostgreSQL's
/// `pg_wchar.h`), so that no text can be lexed; with their other names, as PostgreSQL compares names.
const REFUSED: [&str; 12] = [
    "sjis",
    "shiftjis",
    "mskanji",
    "win932",
    "windows932",
    "big5",
    "gbk",
    "uhc",
    "gb18030",
    "johab",
    "shiftjis2004",
    "win949",
];

/// Longest name in bytes, `NAMEDATALEN - 1`: the parser cuts longer ones, and counts bytes of its own encoding.
const NAME_BYTES_MAX: usize = 63;

/// Whether texts in this encoding can not be read safely, by any name that PostgreSQL takes.
#[must_use]
pub fn is_refused(name: &str) -> bool {
    let plain: String =
        name.chars().filter(char::is_ascii_alphanumeric).map(|letter| letter.to_ascii_lowercase()).collect();
    REFUSED.contains(&plain.as_str()) || ["936", "949", "950"].iter().any(|number| plain.ends_with(number))
}

fn is_utf8(name: &str) -> bool {
    name == "UTF8"
}

/// The text as a string. `None`: it is not in this encoding, or none that is let in.
#[must_use]
pub fn decode<'t>(text: &'t [u8], encoding: &str) -> Option<Cow<'t, str>> {
    match std::str::from_utf8(text) {
        Ok(text) if text.is_ascii() || is_utf8(encoding) => Some(Cow::Borrowed(text)),
        _ if is_utf8(encoding) || is_refused(encoding) => None,
        _ => Some(Cow::Owned(text.iter().map(|byte| char::from(*byte)).collect())),
    }
}

/// What [`decode`] was given.
#[must_use]
pub fn encode<'t>(text: &'t str, encoding: &str) -> Cow<'t, [u8]> {
    if is_utf8(encoding) || text.is_ascii() {
        return Cow::Borrowed(text.as_bytes());
    }
    Cow::Owned(text.chars().map(|letter| u8::try_from(u32::from(letter)).unwrap_or(b'?')).collect())
}

/// Whether a name in the decoded text may be cut by the parser at another place than by the server.
#[must_use]
pub fn may_be_cut(name: &str) -> bool {
    name.len() > NAME_BYTES_MAX && !name.is_ascii()
}

/// How many characters the server counts in bytes of this encoding: positions in errors are in characters.
#[must_use]
pub fn characters(text: &[u8], encoding: &str) -> usize {
    let width: fn(u8) -> usize = match encoding {
        "UTF8" | "SQL_ASCII" => return String::from_utf8_lossy(text).chars().count(),
        "EUC_JP" | "EUC_JIS_2004" => |first| match first {
            0x8f => 3,
            0x80.. => 2,
            _ => 1,
        },
        "EUC_TW" => |first| match first {
            0x8e => 4,
            0x8f => 3,
            0x80.. => 2,
            _ => 1,
        },
        "EUC_CN" | "EUC_KR" => |first| if first >= 0x80 { 2 } else { 1 },
        "MULE_INTERNAL" => |first| match first {
            0x81..=0x8d => 2,
            0x90..=0x9b => 3,
            0x9c..=0x9d => 4,
            _ => 1,
        },
        _ => return text.len(),
    };
    let (mut at, mut count) = (0, 0);
    while let Some(first) = text.get(at) {
        at += width(*first);
        count += 1;
    }
    count
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_text_comes_back(text in proptest::collection::vec(any::<u8>(), 0..64)) {
            for encoding in ["LATIN1", "KOI8R", "EUC_JP", "SQL_ASCII"] {
                let decoded = decode(&text, encoding).unwrap();
                prop_assert_eq!(&encode(&decoded, encoding)[..], &text[..]);
                let _ = characters(&text, encoding);
            }
            if let Some(decoded) = decode(&text, "UTF8") {
                prop_assert_eq!(&encode(&decoded, "UTF8")[..], &text[..]);
            }
        }
    }

    #[test]
    fn encodings_that_hide_ascii_are_refused_by_all_their_names() {
        for name in [
            "SJIS",
            "shift_jis_2004",
            "Mskanji",
            "WIN932",
            "big5",
            "WIN950",
            "GBK",
            "windows-936",
            "UHC",
            "GB18030",
            "johab",
        ] {
            assert!(is_refused(name), "{name}");
            assert!(decode(b"\x95\\", name).is_none());
        }
        for name in ["UTF8", "LATIN1", "win1252", "KOI8R", "EUC_JP", "EUC_KR", "SQL_ASCII", "ISO_8859_5"] {
            assert!(!is_refused(name), "{name}");
        }
        assert!(decode(b"select 'ascii'", "SJIS").is_some());
        assert!(decode(b"\xe9", "UTF8").is_none());
    }

    #[test]
    fn characters_are_counted_as_the_server_does() {
        assert_eq!(characters("aé€".as_bytes(), "UTF8"), 3);
        assert_eq!(characters(b"a\xe9\xa4", "LATIN1"), 3);
        assert_eq!(characters(b"a\xa4\xa2\x8e\xb1\x8f\xb0\xa1b", "EUC_JP"), 5);
        assert_eq!(characters(b"\x8e\xa2\xa1\xa1x", "EUC_TW"), 2);
    }
}
