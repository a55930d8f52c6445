"""What real calendars look like: one small file for each way in which a public report says so.

Every file was made for these tests, after the report that stands beside it; none is copied.
`told` is what a reader in `local` must see from 06:00 UTC of `day` on, for three days.
"""

from __future__ import annotations

from typing import NamedTuple

GITHUB = "https://github.com/"
WEDNESDAY = "2026-11-25"
SPRING, AUTUMN = "2026-03-28", "2026-10-24"  # the day before Europe's clocks are put


class Oddity(NamedTuple):
    name: str
    report: str
    ics: bytes
    told: tuple[str, ...]
    unreadable: int = 0
    day: str = WEDNESDAY
    local: str = "Europe/Berlin"


def calendar(*parts: str, head: str = "") -> bytes:
    lines = ["BEGIN:VCALENDAR", "VERSION:2.0", "PRODID:-//test//EN", *filter(None, [head]), *parts]
    return "\r\n".join([*lines, "END:VCALENDAR", ""]).replace("\r\n\r\n", "\r\n").encode()


def event(*lines: str, title: str = "Tea", uid: str = "a") -> str:
    known = [f"UID:{uid}", "DTSTAMP:20260101T000000Z", f"SUMMARY:{title}"]
    return "\r\n".join(["BEGIN:VEVENT", *known, *lines, "END:VEVENT"])


def zone(name: str, winter: str, summer: str, began: str = "16010101") -> str:
    """A definition with the European dates."""
    return "\r\n".join(
        (
            f"BEGIN:VTIMEZONE\r\nTZID:{name}\r\nBEGIN:STANDARD\r\nDTSTART:{began}T030000",
            f"TZOFFSETFROM:{summer}\r\nTZOFFSETTO:{winter}",
            "RRULE:FREQ=YEARLY;INTERVAL=1;BYDAY=-1SU;BYMONTH=10\r\nEND:STANDARD",
            f"BEGIN:DAYLIGHT\r\nDTSTART:{began}T020000",
            f"TZOFFSETFROM:{winter}\r\nTZOFFSETTO:{summer}",
            "RRULE:FREQ=YEARLY;INTERVAL=1;BYDAY=-1SU;BYMONTH=3\r\nEND:DAYLIGHT\r\nEND:VTIMEZONE",
        )
    )


def at(value: str, until: str = "", zone: str = "Europe/Berlin") -> str:
    """DTSTART and DTEND in a zone, as 26T100000."""
    lines = f"DTSTART;TZID={zone}:202611{value}"
    return lines + (f"\r\nDTEND;TZID={zone}:202611{until}" if until else "")


HOUR = at("26T100000", "26T110000")
TEA = ("Thu 26 10:00-11:00 Tea",)
DAILY = (
    "Wed 25 10:00-11:00 Tea",
    "Thu 26 10:00-11:00 Tea",
    "Fri 27 10:00-11:00 Tea",
)
SERIES = at("20T100000", "20T110000")
RULE = "RRULE:FREQ=DAILY"

ZONES = (
    Oddity(
        "a Windows name that nothing defines",
        GITHUB + "iCalcreator/iCalcreator/issues/102",
        calendar(event(at("26T100000", "26T110000", "W. Europe Standard Time"))),
        TEA,
    ),
    Oddity(
        "a Windows name, elsewhere",
        GITHUB + "kirodotdev/KiroCrew/pull/5557",
        calendar(event(at("26T040000", "26T050000", "Eastern Standard Time"))),
        TEA,
    ),
    Oddity(
        "Customized Time Zone, defined since 1601",
        GITHUB + "allenporter/ical/issues/468",
        calendar(
            zone("Customized Time Zone", "-0500", "-0400"),
            event(at("26T040000", "26T050000", "Customized Time Zone")),
        ),
        TEA,
    ),
    Oddity(
        "the same name for another zone, in the next file",
        GITHUB + "jens-maus/node-ical/issues/13",
        calendar(
            zone("Customized Time Zone", "+0100", "+0200"),
            event(at("20T100000", "20T110000", "Customized Time Zone"), RULE),
        ),
        DAILY,
    ),
    Oddity(
        "Customized Time Zone that nothing defines is local time",
        GITHUB + "Neuvernetzung/ts-ics/issues/104",
        calendar(event(at("26T100000", "26T110000", "Customized Time Zone"))),
        TEA,
    ),
    Oddity(
        "tzone://Microsoft/Custom",
        GITHUB + "jens-maus/node-ical/issues/246",
        calendar(event(at("26T100000", "26T110000", "tzone://Microsoft/Custom"))),
        TEA,
    ),
    Oddity(
        "the words that Windows shows, escaped in one place and quoted in the other",
        GITHUB + "jens-maus/node-ical/issues/246",
        calendar(
            zone("(UTC+00:00) Dublin\\, Lisbon", "+0000", "+0100"),
            event(at("26T090000", "26T100000", '"(UTC+00:00) Dublin, Lisbon"')),
        ),
        TEA,
    ),
    Oddity(
        "a colon in a name without quotes",
        GITHUB + "jens-maus/node-ical/issues/32",
        calendar(
            zone("GMT-05:00", "-0500", "-0400"),
            event(at("26T040000", "26T050000", "GMT-05:00")),
        ),
        TEA,
    ),
    Oddity(
        "no TZ description, and UNTIL in UTC",
        GITHUB + "tybritten/ical-sensor-homeassistant/issues/101",
        calendar(
            event(
                at("20T100000", "20T110000", "(no TZ description)"),
                "RRULE:FREQ=DAILY;UNTIL=20261126T110000Z;INTERVAL=1",
            )
        ),
        DAILY[:2],
    ),
    Oddity(
        "GMT that is defined as London's time, in summer",
        GITHUB + "pretalx/pretalx/issues/2588",
        calendar(
            zone("GMT", "+0000", "+0100"),
            event("DTSTART;TZID=GMT:20260723T102000", "DTEND;TZID=GMT:20260723T105000"),
        ),
        ("Thu 23 11:20-11:50 Tea",),
        day="2026-07-22",
    ),
    Oddity(
        "a place whose definition is an hour off",
        GITHUB + "odoo/odoo/pull/289391",
        calendar(zone("Europe/Berlin", "+0200", "+0300"), event(HOUR)),
        TEA,
    ),
    Oddity(
        "a place whose clocks are no longer put, with the old definition",
        GITHUB + "kewisch/ical.js/issues/455",
        calendar(
            zone("America/Sao_Paulo", "-0200", "-0300"),
            event(at("26T060000", "26T070000", "America/Sao_Paulo")),
        ),
        TEA,
    ),
    Oddity(
        "an abbreviation that nothing defines",
        GITHUB + "fedora-infra/fedocal/pull/109",
        calendar(event(at("26T040000", "26T050000", "EST"))),
        TEA,
    ),
    Oddity(
        "Evolution's prefix",
        GITHUB + "tbartelmess/swift-ical/issues/5",
        calendar(
            event(at("26T100000", "26T110000", "/freeassociation.sourceforge.net/Europe/Berlin"))
        ),
        TEA,
    ),
    Oddity(
        "Mozilla's prefix, and a place of three words",
        GITHUB + "OzzyCzech/icalparser/issues/7",
        calendar(
            event(
                at("26T060000", "26T070000", "/mozilla.org/2007_1/America/Argentina/Buenos_Aires")
            )
        ),
        TEA,
    ),
    Oddity(
        "UTC by name, with blanks at the ends",
        GITHUB + "ical4j/ical4j/issues/510",
        calendar(event("DTSTART;TZID=UTC:20261126T090000 ", "DTEND;TZID=UTC:20261126T100000 ")),
        TEA,
    ),
    Oddity(
        "floating times of a calendar that names its zone",
        GITHUB + "jens-maus/node-ical/pull/251",
        calendar(
            event("DTSTART:20261126T040000", "DTEND:20261126T050000"),
            head="X-WR-TIMEZONE:America/New_York",
        ),
        TEA,
    ),
    Oddity(
        "floating times of one that does not",
        GITHUB + "jens-maus/node-ical/pull/251",
        calendar(event("DTSTART:20261126T100000", "DTEND:20261126T110000")),
        TEA,
    ),
    Oddity(
        "an offset that does not exist",
        GITHUB + "sec-deadlines/sec-deadlines.github.io/pull/305",
        calendar(event(at("26T100000", "26T110000", "Etc/UTC-2"))),
        TEA,
    ),
    Oddity(
        "a zone whose clocks are put every second",
        GITHUB + "kewisch/ical.js/issues/318",
        calendar(
            zone("Odd", "+0100", "+0200").replace(
                "FREQ=YEARLY;INTERVAL=1;BYDAY=-1SU;BYMONTH=3", "FREQ=SECONDLY"
            ),
            event(at("26T100000", "26T110000", "Odd"), uid="odd"),
            event(HOUR),
        ),
        TEA,
        unreadable=1,
    ),
    Oddity(
        "a line of semicolons",
        "",
        calendar(event("DTSTART" + ";" * 60_000 + ":20261126T100000", uid="b"), event(HOUR)),
        TEA,
        unreadable=1,
    ),
    Oddity(
        "a name that leads out of the zones' folder",
        "",
        calendar(event(at("26T100000", "26T110000", "../../../../etc/passwd"))),
        TEA,
    ),
)

CLOCKS = (
    Oddity(
        "an hour that does not exist, in spring",
        "RFC 5545, 3.3.5",
        calendar(
            event(
                "DTSTART;TZID=Europe/Berlin:20260301T023000",
                "DTEND;TZID=Europe/Berlin:20260301T033000",
                RULE,
            )
        ),
        ("Sun 29 03:30-04:30 Tea", "Mon 30 02:30-03:30 Tea", "Tue 31 02:30-03:30 Tea"),
        day=SPRING,
    ),
    Oddity(
        "an hour that is there twice, in autumn: the first of the two",
        "RFC 5545, 3.3.5",
        calendar(
            event(
                "DTSTART;TZID=Europe/Berlin:20261001T023000",
                "DTEND;TZID=Europe/Berlin:20261001T024500",
                RULE,
            )
        ),
        ("Sun 25 02:30-02:45 Tea", "Mon 26 02:30-02:45 Tea", "Tue 27 02:30-02:45 Tea"),
        day=AUTUMN,
    ),
    Oddity(
        "ten o'clock stays ten o'clock",
        GITHUB + "dominik1001/caldav-mcp/pull/94",
        calendar(
            event(
                "DTSTART;TZID=Europe/Berlin:20250106T100000",
                "DTEND;TZID=Europe/Berlin:20250106T110000",
                "RRULE:FREQ=WEEKLY;BYDAY=SA,SU,MO",
            )
        ),
        ("Sat 28 10:00-11:00 Tea", "Sun 29 10:00-11:00 Tea", "Mon 30 10:00-11:00 Tea"),
        day=SPRING,
    ),
    Oddity(
        "a rule in UTC does not",
        "RFC 5545, 3.3.10",
        calendar(
            event("DTSTART:20250106T090000Z", "DTEND:20250106T100000Z", RULE),
        ),
        ("Sat 28 10:00-11:00 Tea", "Sun 29 11:00-12:00 Tea", "Mon 30 11:00-12:00 Tea"),
        day=SPRING,
    ),
    Oddity(
        "whole days around the night in which clocks are put",
        GITHUB + "dominik1001/caldav-mcp/pull/94",
        calendar(event("DTSTART;VALUE=DATE:20261024", "DTEND;VALUE=DATE:20261026")),
        ("Sat 24 - Sun 25 Tea",),
        day=AUTUMN,
    ),
    Oddity(
        "a day that begins at one o'clock",
        "Egypt puts its clocks at midnight",
        calendar(event("DTSTART;VALUE=DATE:20260424", "RRULE:FREQ=YEARLY")),
        ("Fri 24 Tea",),
        day="2026-04-23",
        local="Africa/Cairo",
    ),
)

RULES = (
    Oddity(
        "UNTIL as a day",
        GITHUB + "jazzband/icalevents/issues/71",
        calendar(event(SERIES, "RRULE:FREQ=DAILY;WKST=SU;UNTIL=20261126")),
        DAILY[:1],
    ),
    Oddity(
        "UNTIL in local time, as iPhones write it",
        GITHUB + "jelmer/xandikos/issues/571",
        calendar(event(SERIES, "RRULE:FREQ=DAILY;UNTIL=20261126T100000")),
        DAILY[:2],
    ),
    Oddity(
        "UNTIL the year 1, Microsoft's word for no end",
        GITHUB + "jkbrzt/rrule/issues/385",
        calendar(event(SERIES, "RRULE:FREQ=DAILY;UNTIL=00010101T000000Z")),
        DAILY,
    ),
    Oddity(
        "UNTIL a time, for whole days",
        GITHUB + "fmeringdal/rust-rrule/issues/2",
        calendar(
            event(
                "DTSTART;VALUE=DATE:20260812",
                "RRULE:FREQ=WEEKLY;UNTIL=20261124T230000Z;INTERVAL=1;BYDAY=WE;WKST=MO",
            )
        ),
        (),
    ),
    Oddity(
        "a semicolon at the end",
        GITHUB + "libical/libical/pull/191",
        calendar(event(SERIES, "RRULE:FREQ=DAILY;INTERVAL=1;")),
        DAILY,
    ),
    Oddity(
        "INTERVAL=0",
        GITHUB + "libical/libical/issues/135",
        calendar(event(SERIES, "RRULE:FREQ=DAILY;INTERVAL=0")),
        DAILY,
    ),
    Oddity(
        "INTERVAL=.007",
        GITHUB + "jkbrzt/rrule/issues/568",
        calendar(event(SERIES, "RRULE:FREQ=DAILY;INTERVAL=.007")),
        DAILY,
    ),
    Oddity(
        "every 30th of February",
        GITHUB + "libical/libical/pull/188",
        calendar(
            event(SERIES, "RRULE:FREQ=DAILY;BYMONTH=2;BYMONTHDAY=30", uid="never"),
            event(HOUR),
        ),
        TEA,
        unreadable=1,
    ),
    Oddity(
        "every second since 1970",
        GITHUB + "meziantou/Meziantou.Framework/pull/2385",
        calendar(event("DTSTART:19700101T000000Z", "RRULE:FREQ=SECONDLY", uid="bomb"), event(HOUR)),
        TEA,
        unreadable=1,
    ),
    Oddity(
        "Thanksgiving, said twice over",
        GITHUB + "libical/libical/issues/140",
        calendar(
            event(
                "DTSTART;VALUE=DATE:20111124",
                "DTEND;VALUE=DATE:20111125",
                "RRULE:FREQ=YEARLY;BYDAY=4TH;BYMONTH=11",
            )
        ),
        ("Thu 26 Tea",),
    ),
    Oddity(
        "a rule of another calendar's months",
        GITHUB + "collective/icalendar/issues/653",
        calendar(
            event("DTSTART;VALUE=DATE:20130210", "RRULE:RSCALE=CHINESE;FREQ=YEARLY", uid="b"),
            event("DTSTART;VALUE=DATE:20121126", "RRULE:RSCALE=GREGORIAN;FREQ=YEARLY;SKIP=OMIT"),
        ),
        ("Thu 26 Tea",),
        unreadable=1,
    ),
    Oddity(
        "a rule that is none",
        GITHUB + "jkbrzt/rrule/issues/446",
        calendar(
            event(SERIES, "RRULE:FREQ=SOMETIMES", uid="b"),
            event(SERIES, "RRULE:RRULE:FREQ=DAILY", uid="c"),
            event(HOUR),
        ),
        TEA,
        unreadable=2,
    ),
    Oddity(
        "a series all of whose occurrences are excluded",
        GITHUB + "przemub/ics_caldav_sync/pull/20",
        calendar(
            event(HOUR, "RRULE:FREQ=DAILY;COUNT=1", "EXDATE;TZID=Europe/Berlin:20261126T100000")
        ),
        (),
    ),
    Oddity(
        "a birthday, since 1960",
        GITHUB + "dateutil/dateutil/issues/1441",
        calendar(event("DTSTART;VALUE=DATE:19601126", "RRULE:FREQ=YEARLY;BYMONTH=11")),
        ("Thu 26 Tea",),
    ),
    Oddity(
        "every day for ever, since 1990",
        GITHUB + "nextcloud/calendar/issues/1387",
        calendar(
            event("DTSTART;TZID=Europe/Berlin:19900101T100000", "DURATION:PT1H", RULE, uid="old")
        ),
        DAILY,
    ),
    Oddity(
        "every other week keeps its week",
        GITHUB + "niccokunzmann/python-recurring-ical-events/issues/253",
        calendar(
            event(
                "DTSTART;TZID=Europe/Berlin:20200102T100000",
                "DURATION:PT1H",
                "RRULE:FREQ=WEEKLY;INTERVAL=2;BYDAY=TH",
            )
        ),
        ("Thu 26 10:00-11:00 Tea",),
    ),
    Oddity(
        "dates by RDATE, as periods in a quoted zone",
        GITHUB + "ical-org/ical.net/issues/462",
        calendar(
            zone("Eastern", "-0500", "-0400"),
            event(
                at("20T040000", "20T050000", '"Eastern"'),
                'RDATE;TZID="Eastern";VALUE=PERIOD:20261125T040000/20261125T050000\r\n'
                " ,20261126T040000/20261126T050000",
            ),
        ),
        DAILY[:2],
    ),
)

EXCEPTIONS = (
    Oddity(
        "EXDATE in the zone",
        GITHUB + "libical/libical/issues/22",
        calendar(event(SERIES, RULE, "EXDATE;TZID=Europe/Berlin:20261126T100000")),
        (DAILY[0], DAILY[2]),
    ),
    Oddity(
        "EXDATE in UTC for a series in a zone",
        GITHUB + "DouglasdeMoura/chroncal/issues/492",
        calendar(event(SERIES, RULE, "EXDATE:20261126T090000Z")),
        (DAILY[0], DAILY[2]),
    ),
    Oddity(
        "EXDATE as a day for a series of times",
        GITHUB + "ical-org/ical.net/pull/830",
        calendar(event(SERIES, RULE, "EXDATE;VALUE=DATE:20261126")),
        (DAILY[0], DAILY[2]),
    ),
    Oddity(
        "several EXDATE in one line, of a Windows zone",
        GITHUB + "derekantrican/GAS-ICS-Sync/issues/398",
        calendar(
            event(
                at("20T100000", "20T110000", "W. Europe Standard Time"),
                RULE,
                "EXDATE;TZID=W. Europe Standard Time:20261126T100000,20261127T100000,",
            )
        ),
        DAILY[:1],
    ),
    Oddity(
        "EXDATE with a time for whole days",
        GITHUB + "niccokunzmann/python-recurring-ical-events/issues/20",
        calendar(event("DTSTART;VALUE=DATE:20261125", RULE, "EXDATE:20261125T230000Z")),
        ("Wed 25 Tea", "Fri 27 Tea", "Sat 28 Tea"),
    ),
    Oddity(
        "RECURRENCE-ID in another zone than the series",
        GITHUB + "bitfireAT/synctools/issues/80",
        calendar(
            event(at("20T220000", "20T230000", "Pacific/Auckland"), "RRULE:FREQ=DAILY;COUNT=7"),
            event(
                "RECURRENCE-ID;TZID=Europe/Paris:20261126T100000",
                at("26T120000", "26T130000"),
                title="Late tea",
            ),
        ),
        ("Wed 25 10:00-11:00 Tea", "Thu 26 12:00-13:00 Late tea"),
    ),
    Oddity(
        "an occurrence that became a whole day",
        GITHUB + "ical4j/ical4j/issues/510",
        calendar(
            event(SERIES, "RRULE:FREQ=DAILY;COUNT=7"),
            event(
                "RECURRENCE-ID;TZID=Europe/Berlin:20261126T100000", "DTSTART;VALUE=DATE:20261126"
            ),
        ),
        ("Wed 25 10:00-11:00 Tea", "Thu 26 Tea"),
    ),
    Oddity(
        "an exception before its series, and in a calendar of its own",
        GITHUB + "etesync/etesync-web/issues/67",
        calendar(
            event("RECURRENCE-ID;TZID=Europe/Berlin:20261126T100000", at("26T150000", "26T160000")),
            "END:VCALENDAR\r\nBEGIN:VCALENDAR",
            event(SERIES, RULE),
        ),
        (DAILY[0], "Thu 26 15:00-16:00 Tea", DAILY[2]),
    ),
    Oddity(
        "exceptions without their series",
        GITHUB + "pimutils/khal/issues/447",
        calendar(
            event(f"RECURRENCE-ID;TZID=Europe/Berlin:20261126T090000\r\n{HOUR}"),
            event("RECURRENCE-ID;TZID=Europe/Berlin:20261127T090000", at("27T100000", "27T110000")),
        ),
        DAILY[1:],
    ),
    Oddity(
        "an exception that carries the rule as well",
        GITHUB + "Kozea/Radicale/issues/1635",
        calendar(
            event(SERIES, "RRULE:FREQ=DAILY;COUNT=7"),
            event(
                "RECURRENCE-ID;TZID=Europe/Berlin:20261126T100000",
                at("26T100000", "26T113000"),
                "RRULE:FREQ=DAILY;COUNT=7",
            ),
        ),
        (DAILY[0], "Thu 26 10:00-11:30 Tea"),
    ),
    Oddity(
        "this one and all that follow",
        GITHUB + "ical-org/ical.net/issues/455",
        calendar(
            event(SERIES, RULE),
            event(
                "RECURRENCE-ID;RANGE=THISANDFUTURE;TZID=Europe/Berlin:20261126T100000",
                at("26T120000", "26T130000"),
            ),
        ),
        (DAILY[0], "Thu 26 12:00-13:00 Tea", "Fri 27 12:00-13:00 Tea"),
    ),
    Oddity(
        "one occurrence cancelled, another declined",
        GITHUB + "mustang-im/mustang/pull/785",
        calendar(
            event(SERIES, RULE),
            event(f"RECURRENCE-ID:20261126T090000Z\r\n{HOUR}", "STATUS:CANCELLED"),
            event(
                "RECURRENCE-ID:20261127T090000Z",
                at("27T100000", "27T110000"),
                "ATTENDEE;PARTSTAT=DECLINED;CN=Ada:mailto:Ada@example.org",
            ),
        ),
        DAILY[:1],
    ),
    Oddity(
        "an occurrence that moved here from next year",
        GITHUB + "ical4j/ical4j/issues/510",
        calendar(
            event("DTSTART;TZID=Europe/Berlin:20200101T080000", "RRULE:FREQ=YEARLY"),
            event(f"RECURRENCE-ID;TZID=Europe/Berlin:20270101T080000\r\n{HOUR}"),
        ),
        TEA,
    ),
)

ENDS = (
    Oddity(
        "a whole day that ends on the day it begins",
        GITHUB + "pimutils/khal/issues/129",
        calendar(event("DTSTART;VALUE=DATE:20261126", "DTEND;VALUE=DATE:20261126")),
        ("Thu 26 Tea",),
    ),
    Oddity(
        "a whole day without an end",
        GITHUB + "openhab/openhab-addons/pull/12482",
        calendar(event("DTSTART;VALUE=DATE:20261126")),
        ("Thu 26 Tea",),
    ),
    Oddity(
        "a day that does not say that it is one",
        GITHUB + "u01jmg3/ics-parser/issues/186",
        calendar(event("DTSTART:20261126", "DTEND:20261128")),
        ("Thu 26 - Fri 27 Tea",),
    ),
    Oddity(
        "a time without an end",
        GITHUB + "ical2org-py/ical2org.py/pull/16",
        calendar(event(at("26T100000"))),
        ("Thu 26 10:00-10:00 Tea",),
    ),
    Oddity(
        "an end at the beginning",
        GITHUB + "pimutils/khal/issues/610",
        calendar(event(at("26T100000", "26T100000"))),
        ("Thu 26 10:00-10:00 Tea",),
    ),
    Oddity(
        "an end before the beginning",
        GITHUB + "derekantrican/GAS-ICS-Sync/issues/56",
        calendar(event(at("26T100000", "26T090000"))),
        ("Thu 26 10:00-10:00 Tea",),
    ),
    Oddity(
        "an end that is a day",
        GITHUB + "derekantrican/GAS-ICS-Sync/pull/58",
        calendar(event(at("26T100000"), "DTEND;VALUE=DATE:20261127")),
        ("Thu 26 10:00-00:00 Tea",),
    ),
    Oddity(
        "a whole day by Microsoft's mark",
        GITHUB + "Enough-Software/enough_icalendar/issues/1",
        calendar(event(at("26T000000", "27T000000"), "X-MICROSOFT-CDO-ALLDAYEVENT:TRUE")),
        ("Thu 26 Tea",),
    ),
    Oddity(
        "lengths by the letter and beside it",
        GITHUB + "bitfireAT/ical4android/issues/77",
        calendar(
            event(at("26T100000"), "DURATION:PT1H"),
            event(at("26T120000"), "DURATION:PT1D", uid="b"),
            event(at("26T130000"), "DURATION:P1W2DT3H", uid="c", title="Long"),
            event(at("26T140000"), "DURATION:-PT1H", uid="d", title="Back"),
            event(at("26T150000"), "DURATION:P", uid="e", title="None"),
        ),
        (
            "Thu 26 10:00-11:00 Tea",
            "Thu 26 12:00-12:00 Tea",
            "Thu 26 13:00-16:00 Long",
            "Thu 26 14:00-14:00 Back",
            "Thu 26 15:00-15:00 None",
        ),
    ),
    Oddity(
        "times that no calendar has",
        GITHUB + "kewisch/ical.js/issues/318",
        calendar(
            event("DTSTART:00000000T000000Z", uid="b"),
            event("DTSTART:20261331T000000Z", uid="c"),
            event("DTSTART:00010101T000000", uid="d"),
            event("DTSTART;VALUE=DATE:99991231", uid="e"),
            event("DTSTART:tomorrow", uid="f"),
            event("DTSTART:", uid="g"),
            event(uid="h"),
            event("DTSTART;TZID=Europe/Berlin:20261126T100060", "DURATION:PT1H"),
        ),
        TEA,
        unreadable=6,  # the year 1 can be read; it is only long ago
    ),
)

TEXT = (
    Oddity(
        "a byte order mark",
        GITHUB + "Medical-Software-Foundation/canvas/pull/327",
        b"\xef\xbb\xbf" + calendar(event(HOUR)),
        TEA,
    ),
    Oddity(
        "a fold within a character",
        GITHUB + "icalendar/icalendar/issues/238",
        calendar(event(HOUR, title="K?")).replace(
            b"K?", "Kä".encode()[:2] + b"\r\n " + "ä".encode()[1:]
        ),
        ("Thu 26 10:00-11:00 Kä",),
    ),
    Oddity(
        "lines that end in LF, and folds with a tab",
        GITHUB + "hoodie/icalendar/issues/47",
        calendar(event(HOUR, title="Te\r\n\ta")).replace(b"\r\n", b"\n"),
        TEA,
    ),
    Oddity(
        "lines that end in CR",
        GITHUB + "peterbraden/ical.js/issues/105",
        calendar(event(HOUR)).replace(b"\r\n", b"\r"),
        TEA,
    ),
    Oddity(
        "lines without an end, and empty ones",
        GITHUB + "techsoc/techsoc.github.io/issues/1",
        calendar(event(HOUR, "DESCRIPTION:" + "x" * 100_000)).replace(b"\r\n", b"\r\n\r\n"),
        TEA,
    ),
    Oddity(
        "Latin-1",
        GITHUB + "u01jmg3/ics-parser/issues/111",
        calendar(event(HOUR, title="Caf\u00e9")).decode().encode("latin-1"),
        ("Thu 26 10:00-11:00 Café",),
    ),
    Oddity(
        "escapes, and a title in a language",
        GITHUB + "pimutils/khal/issues/129",
        calendar(
            event(HOUR, title="").replace(
                "SUMMARY:", r"SUMMARY;LANGUAGE=nl-nl:Tea\, cake\; \"\\\n and more"
            )
        ),
        ('Thu 26 10:00-11:00 Tea, cake; "\\ and more',),
    ),
    Oddity(
        "lower case",
        GITHUB + "libical/libical/issues/427",
        calendar(event("dtstart:20261126T090000Z", "dtend:20261126t100000z")).replace(
            b"BEGIN:VEVENT", b"begin:vevent"
        ),
        TEA,
    ),
    Oddity(
        "an alarm with a title, a length and a start of its own",
        GITHUB + "peterbraden/ical.js/issues/19",
        calendar(
            event(
                "BEGIN:VALARM\r\nTRIGGER:PT\r\nSUMMARY:Alarm\r\nDURATION:PT9H\r\nUID:z",
                "DTSTART:19700101T000000Z\r\nEND:VALARM",
                HOUR,
            )
        ),
        TEA,
    ),
    Oddity(
        "guests whose names hold colons and semicolons",
        GITHUB + "ical-org/ical.net/issues/462",
        calendar(
            event('ATTENDEE;CN="Doe; Jane: DTSTART:x";RSVP=TRUE:MAILTO:jane@example.org', HOUR)
        ),
        TEA,
    ),
    Oddity(
        "an event that does not end",
        GITHUB + "open-horizon-labs/obsidian-ics/pull/97",
        calendar(
            event(HOUR).replace("END:VEVENT", ""), event(at("27T100000", "27T110000"), uid="b")
        ),
        DAILY[1:],
    ),
    Oddity(
        "tasks, journals and free-busy among the events",
        GITHUB + "hoodie/icalendar/issues/47",
        calendar(
            f"BEGIN:VTODO\r\nUID:t\r\nSUMMARY:Task\r\n{HOUR}\r\nEND:VTODO",
            f"BEGIN:VFREEBUSY\r\nUID:f\r\n{HOUR}\r\nEND:VFREEBUSY",
            event(HOUR),
        ),
        TEA,
    ),
)

NAMES = (
    Oddity(
        "no UID",
        GITHUB + "derekantrican/GAS-ICS-Sync/issues/89",
        calendar(
            event(HOUR, uid="").replace("UID:\r\n", ""),
            event(at("27T100000", "27T110000"), uid="").replace("UID:\r\n", ""),
        ),
        DAILY[1:],
    ),
    Oddity(
        "one UID for several events",
        GITHUB + "geeksforsocialchange/PlaceCal/issues/2993",
        calendar(event(HOUR), event(at("27T100000", "27T110000"))),
        DAILY[1:],
    ),
    Oddity(
        "an older version of the event beside it",
        GITHUB + "Kozea/Radicale/issues/401",
        calendar(
            event(at("26T080000", "26T090000"), "SEQUENCE:1"),
            event(HOUR, "SEQUENCE:3"),
            event(at("26T120000", "26T130000"), "SEQUENCE:2"),
        ),
        TEA,
    ),
)

ODDITIES = (*ZONES, *CLOCKS, *RULES, *EXCEPTIONS, *ENDS, *TEXT, *NAMES)
