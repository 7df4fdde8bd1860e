//! What a statement leaves behind in its session, beyond its transaction.

use pg_query::NodeEnum;
use pg_query::protobuf::{DiscardMode, VariableSetKind};

use super::functions;
use super::needs::Needs;

/// Option of DECLARE: WITH HOLD (`CURSOR_OPT_HOLD` of `parsenodes.h`).
const CURSOR_OPT_HOLD: i32 = 0x0020;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Stays {
    #[default]
    Nothing,
    /// A setting has another value; its name in lower case.
    Set(String),
    /// It has the session's own again.
    Reset(String),
    ResetAll,
    /// It calls `set_config()`: whether that outlives the transaction is in the literals.
    SetConfig,
    Listen(String),
    Unlisten(String),
    UnlistenAll,
    /// DISCARD ALL: nothing of before is left.
    All,
    /// Something that no other server can be given, and what.
    Unmovable(&'static str),
}

impl Stays {
    /// It calls or fires code that is not proven to leave nothing.
    pub const CODE: Self =
        Self::Unmovable("it has called or fired code that may have set something for the whole session");
    /// What it does is not known. If the server can not read it either it does nothing.
    pub const UNREAD: Self = Self::Unmovable("it has run a statement that pgtandem can not read");
}

/// What this statement leaves behind.
#[must_use]
pub fn stays(node: &NodeEnum, needs: &Needs) -> Stays {
    match node {
        NodeEnum::VariableSetStmt(set) => {
            let name = set.name.to_ascii_lowercase();
            match VariableSetKind::try_from(set.kind) {
                Ok(VariableSetKind::VarResetAll) => Stays::ResetAll,
                _ if set.is_local || matches!(name.as_str(), "transaction" | "transaction snapshot") => Stays::Nothing,
                Ok(VariableSetKind::VarReset | VariableSetKind::VarSetDefault) => Stays::Reset(name),
                _ => Stays::Set(name),
            }
        }
        NodeEnum::ListenStmt(listen) => Stays::Listen(listen.conditionname.clone()),
        NodeEnum::UnlistenStmt(unlisten) if unlisten.conditionname.is_empty() => Stays::UnlistenAll,
        NodeEnum::UnlistenStmt(unlisten) => Stays::Unlisten(unlisten.conditionname.clone()),
        NodeEnum::DiscardStmt(discard) if discard.target == DiscardMode::DiscardAll as i32 => Stays::All,
        NodeEnum::DeclareCursorStmt(cursor) if cursor.options & CURSOR_OPT_HOLD != 0 => {
            Stays::Unmovable("it has declared a cursor WITH HOLD")
        }
        _ => match needs.functions.iter().find_map(|name| functions::stays(&name.name)) {
            Some(why) => Stays::Unmovable(why),
            None if needs.functions.iter().any(|name| name.name == "set_config") => Stays::SetConfig,
            None => Stays::Nothing,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::parse;

    fn of(text: &str) -> Stays {
        let statement = parse::parse_one(text).unwrap();
        stays(&statement.node, &Needs::of(&statement))
    }

    #[test]
    fn what_stays_is_seen_in_the_tree() {
        let set = |name: &str| Stays::Set(name.to_owned());
        assert_eq!(of("SET Work_Mem = '1MB'"), set("work_mem"));
        assert_eq!(of("SET SESSION search_path TO a, b"), set("search_path"));
        assert_eq!(of("SET ROLE r"), set("role"));
        assert_eq!(of("SET TIME ZONE 'UTC'"), set("timezone"));
        assert_eq!(of("SET app.who = 'x'"), set("app.who"));
        assert_eq!(of("SET LOCAL work_mem = '1MB'"), Stays::Nothing);
        assert_eq!(of("SET TRANSACTION READ ONLY"), Stays::Nothing);
        assert_eq!(of("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"), set("session characteristics"));
        assert_eq!(of("SET work_mem TO DEFAULT"), Stays::Reset("work_mem".into()));
        assert_eq!(of("RESET ALL"), Stays::ResetAll);
        assert_eq!(of("SELECT set_config('a.b', 'c', false)"), Stays::SetConfig);
        assert_eq!(of("LISTEN news"), Stays::Listen("news".into()));
        assert_eq!(of("UNLISTEN *"), Stays::UnlistenAll);
        assert_eq!(of("DISCARD ALL"), Stays::All);
        assert_eq!(of("DISCARD PLANS"), Stays::Nothing);
        assert!(matches!(of("DECLARE c CURSOR WITH HOLD FOR SELECT 1"), Stays::Unmovable(_)));
        assert_eq!(of("DECLARE c CURSOR FOR SELECT 1"), Stays::Nothing);
        assert!(matches!(of("SELECT 1 WHERE pg_try_advisory_lock(1)"), Stays::Unmovable(_)));
        assert!(matches!(of("SELECT setseed(0.5)"), Stays::Unmovable(_)));
        assert!(matches!(of("SELECT query_to_xml('SELECT f()', true, true, '')"), Stays::Unmovable(_)));
        assert_eq!(of("SELECT pg_advisory_xact_lock(1)"), Stays::Nothing);
        assert_eq!(of("SELECT 1"), Stays::Nothing);
    }
}
