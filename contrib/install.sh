#!/bin/sh
# make install, make uninstall: put hive where you, or the whole machine, can run it; take it away.
#
#   PREFIX    where bin/hive, lib/hive/ and share/man/ go; else ~/.local
#   DESTDIR   put everything below this folder instead, as packages want it; nothing is started
#   START=1   start the daemon too
#   PYTHON    the Python to run it with, 3.11 or newer; else python3
#   RUN_AS    the user of the system's daemon; else hive
#
# A prefix outside the home directory, as root or with DESTDIR, means the whole machine: a system
# unit and /etc/hive.  All else is for you alone.  Configuration and handlers that are there stay
# as they are, and uninstall keeps them.  Running it again repairs what is missing.

set -eu
umask 022
CDPATH='' cd -- "$(dirname -- "$0")/.."

PREFIX=${PREFIX:-$HOME/.local} DESTDIR=${DESTDIR:-} START=${START:-} RUN_AS=${RUN_AS:-hive}
PREFIX=${PREFIX%/} DESTDIR=${DESTDIR%/} PYTHON=${PYTHON:-python3}
bin=$PREFIX/bin lib=$PREFIX/lib/hive man=$PREFIX/share/man
me=$(id -u)

say() { printf '%-10s%s\n' "$1" "$2"; }
fail() {
  printf 'hive: %s\n' "$1" >&2
  exit 1
}

case $PREFIX in /*) ;; *) fail "PREFIX=$PREFIX: expected a path that begins with /" ;; esac
case $PREFIX/ in
  "$HOME"/*) for=user ;;
  *) if [ "$me" = 0 ] || [ -n "$DESTDIR" ]; then for=system; else for=user; fi ;;
esac
case $for in
  user) config=$HOME/.config/hive state=$HOME/.local/state/hive folder_mode=700 file_mode=600 ;;
  system) config=/etc/hive state=/var/lib/hive folder_mode=750 file_mode=640 ;;
esac
manager=--$for
# unit_of NAME: where the unit of hive's daemon, or of another program of it, lies.
unit_of() {
  case $(uname -s)-$for in
    Darwin-user) echo "$HOME/Library/LaunchAgents/ai.hive.$1.plist" ;;
    Darwin-system) ;;  # launchd's daemons run as root; hive should not
    *-user) echo "$HOME/.config/systemd/user/hive-$1.service" ;;
    *-system) echo "/etc/systemd/system/hive-$1.service" ;;
  esac
}
unit=$(unit_of daemon)

# ---- Steps: each says what it does -------------------------------------------------------

scratch=$(mktemp -d)
made=  # folders, one on a line
changed=
# What was made is remembered, however this ends, for uninstall.
leave() {
  if [ -n "$made" ]; then printf %s "$made" >>"$DESTDIR$lib/folders"; fi
  rm -rf "$scratch"
}
trap leave EXIT
trap 'exit 130' HUP INT TERM

# folder PATH MODE: make it, and what is above it.
folder() {
  if [ -d "$DESTDIR$1" ]; then return; fi
  case $1 in /*/*) folder "$(dirname "$1")" 755 ;; esac
  mkdir -p "$DESTDIR$1"
  chmod "$2" "$DESTDIR$1"
  made="$made$1
"
  say made "$DESTDIR$1"
}

# put FILE TARGET MODE: copy it, all at once, unless it is the same already.
put() {
  if cmp -s "$1" "$DESTDIR$2"; then
    say unchanged "$DESTDIR$2"
  else
    cp "$1" "$DESTDIR$2.new"
    mv -f "$DESTDIR$2.new" "$DESTDIR$2"
    changed=yes
    say installed "$DESTDIR$2"
  fi
  chmod "$3" "$DESTDIR$2"
}

# put_once FILE TARGET MODE: as soon as it is there it belongs to the user.
put_once() {
  if [ -e "$DESTDIR$2" ] || [ -L "$DESTDIR$2" ]; then say kept "$DESTDIR$2"; else put "$@"; fi
}

drop() {
  if [ -e "$DESTDIR$1" ] || [ -L "$DESTDIR$1" ]; then
    rm -rf "$DESTDIR$1"
    say removed "$DESTDIR$1"
  fi
}

# ours NAME: is this program in bin/ from here?  There are others called hive.
ours() { grep -qs 'lib/hive/hive' "$DESTDIR$bin/$1"; }

# Quoted for sh, for a unit, for XML; and for sed, to be put in the place of @WORD@.
for_sh() { printf "'%s'" "$(printf %s "$1" | sed "s/'/'\\\\''/g")"; }
for_unit() { printf %s "$1" | sed 's/%/%%/g' | for_sed; }
for_xml() { printf %s "$1" | sed 's/&/\&amp;/g; s/</\&lt;/g; s/>/\&gt;/g' | for_sed; }
for_sed() { sed 's/[\\&|]/\\&/g'; }

# ---- Install -----------------------------------------------------------------------------

check() {
  if [ "$for" = user ] && [ "$me" = 0 ] && [ -n "${SUDO_USER:-}" ] &&
    [ -z "$(find "$HOME" -prune -user 0)" ]; then
    fail "this would put root's files into $HOME; leave out sudo, or say PREFIX=/usr/local"
  fi
  for name in hive hive-cli; do
    if [ -e "$DESTDIR$bin/$name" ] && ! ours "$name"; then
      fail "$DESTDIR$bin/$name is not from here; move it away, or say another PREFIX"
    fi
  done
  case $unit:$bin in
    *.service:*[\'\"\\]*) fail "$bin: systemd runs nothing whose path has a quote or a backslash" ;;
  esac
  # The interpreter itself, not a virtual environment that happens to be active.
  python=$("$PYTHON" -c 'import sys
if sys.version_info < (3, 11): sys.exit("hive: Python 3.11 or newer is needed, and this is "
    + sys.version.split()[0] + "; try: make install PYTHON=python3.12")
print(getattr(sys, "_base_executable", sys.executable))') || exit 1
}

# Isolated: what PYTHONPATH and the home directory add now may be missing for the daemon.
has_paho() {
  "$1" -I -c 'import sys, paho.mqtt as it; sys.exit(it.__version__ < "2")' 2>/dev/null
}

find_paho() {
  if [ -n "$DESTDIR" ]; then
    say python "$python; DESTDIR gets no virtual environment: let the package need paho-mqtt >= 2"
  elif has_paho "$lib/venv/bin/python"; then
    python=$lib/venv/bin/python
    say unchanged "$lib/venv"
  elif has_paho "$python"; then
    say python "$python, which has paho-mqtt: no virtual environment is needed"
  else
    say making "$lib/venv, a virtual environment with paho-mqtt from PyPI"
    "$python" -m venv --clear "$lib/venv"
    python=$lib/venv/bin/python
    "$python" -m pip install --quiet --disable-pip-version-check "${PAHO:-paho-mqtt>=2,<3}" ||
      fail "no paho-mqtt from PyPI; PYTHON=... may also be a Python that has it"
    changed=yes
  fi
}

install_programs() {
  folder "$lib" 755
  folder "$bin" 755
  find_paho
  put hive.py "$lib/hive.py" 755
  for name in hive hive-cli; do  # one program that calls itself what it was called
    put hive-cli "$lib/$name" 755
    printf '#!/bin/sh\nexec %s %s "$@"\n' "$(for_sh "$python")" "$(for_sh "$lib/$name")" \
      >"$scratch/$name"
    put "$scratch/$name" "$bin/$name" 755
  done
  # Compiled here, because who may not write there would compile it anew at each call.
  hive=hive-cli
  if [ -z "$DESTDIR" ]; then
    "$python" -m compileall -q "$lib/hive.py"
    "$python" "$lib/hive-cli" mcp </dev/null || :  # the part of it that a session loads
    hive=$lib/hive-cli
  fi
}

# What hive help prints, and the same as man pages.
install_help() {
  folder "$lib/help" 755
  for topic in contrib/help/*.md; do put "$topic" "$lib/help/${topic##*/}" 644; done
  mkdir "$scratch/man"
  "$python" contrib/man.py "$scratch/man"
  for page in "$scratch"/man/*; do
    folder "$man/man${page##*.}" 755
    put "$page" "$man/man${page##*.}/${page##*/}" 644
  done
}

# Where each shell looks for what completes a command's words, below PREFIX/share.
completions='bash-completion/completions/hive zsh/site-functions/_hive fish/vendor_completions.d/hive.fish'

install_completions() {
  for place in $completions; do
    "$python" -B "$hive" completion "${place%%[-/]*}" >"$scratch/completion"
    folder "$(dirname "$PREFIX/share/$place")" 755
    put "$scratch/completion" "$PREFIX/share/$place" 644
  done
}

install_configuration() {
  folder "$config" "$folder_mode"
  folder "$config/hive-daemon.d" "$folder_mode"
  "$python" -B "$hive" config --example >"$scratch/example.toml"
  # The daemon learns its state directory from systemd; hive-cli, which speaks to it there, does not.
  if [ "$for" = system ]; then
    sed "s|^# state_dir = [^#]*|state_dir = \"$state\"  |" "$scratch/example.toml" >"$scratch/hive.toml"
  else
    cp "$scratch/example.toml" "$scratch/hive.toml"
  fi
  put_once "$scratch/hive.toml" "$config/hive.toml" "$file_mode"
  put_once hive-daemon.d/ping "$config/hive-daemon.d/ping" 755
  if [ "$for" = system ]; then share_configuration; fi
}

# Root writes it, the daemon reads it, nobody else does.
share_configuration() {
  if [ -n "$DESTDIR" ]; then
    say note "$config must belong to the group of $RUN_AS once the package has made that user"
    return
  fi
  if ! id -u "$RUN_AS" >/dev/null 2>&1; then
    useradd --system --user-group --home-dir "$state" --shell /usr/sbin/nologin "$RUN_AS"
    say made "the user $RUN_AS"
  fi
  find "$config" "$config/hive.toml" "$config/hive-daemon.d" -prune -user 0 \
    -exec chgrp "$(id -g "$RUN_AS")" {} +
}

# install_unit NAME
install_unit() {
  each=$(unit_of "$1")
  case $each in
    *.plist)
      folder "$HOME/Library/Logs" 755
      sed -e "s|@BINDIR@|$(for_xml "$bin")|g" -e "s|@HOME@|$(for_xml "$HOME")|g" \
        "units/launchd/ai.hive.$1.plist" >"$scratch/unit" ;;
    *.service)
      if [ "$for" = user ]; then other=system; else other=user; fi
      sed -e "/^# --- $other only/,/^# --- end/d" -e '/^# --- /d' -e "s|@USER@|$RUN_AS|g" \
        -e "s|@BINDIR@|$(for_unit "$bin")|g" "units/systemd/hive-$1.service" >"$scratch/unit" ;;
  esac
  folder "$(dirname "$each")" 755
  put "$scratch/unit" "$each" 644
}

# ---- Start and stop ----------------------------------------------------------------------

job=gui/$me/ai.hive

# Is there somebody to start it?
reachable() {
  if [ -n "$DESTDIR" ]; then return 1; fi
  case $unit in
    *.plist) command -v launchctl ;;
    *.service) command -v systemctl && systemctl "$manager" daemon-reload ;;
  esac >/dev/null 2>&1
}

# stop NAME
stop() {
  case $unit in
    *.plist) launchctl bootout "$job.$1" ;;
    *.service) systemctl "$manager" stop "hive-$1" ;;
  esac >/dev/null 2>&1 || true
}

# Where somebody has started it.
restart_page() {
  case $unit in
    *.plist) launchctl kickstart -k "$job.web" ;;
    */user/*) systemctl "$manager" try-restart hive-web ;;
  esac >/dev/null 2>&1 || true
}

start() {
  case $unit in
    *.plist) launchctl print "$job.daemon" >/dev/null 2>&1 || launchctl bootstrap "gui/$me" "$unit" ;;
    *.service) systemctl "$manager" enable --now hive-daemon ;;
  esac
}

start_or_say_how() {
  case $unit in
    *.plist) how="launchctl bootstrap gui/$me '$unit'" ;;
    *.service) how="systemctl $manager enable --now hive-daemon" ;;
  esac
  if [ -z "$START" ]; then
    say next "$how"
  elif reachable; then
    if [ -n "$changed" ]; then
      stop daemon
      restart_page
    fi
    start || fail "not started: $how"
    say started "$how"
  else
    say skipped "START=1: neither systemd nor launchd is at work here; run: $bin/hive daemon"
  fi
}

# ---- Uninstall ---------------------------------------------------------------------------

# remove_unit NAME: stop it, and take it out.
remove_unit() {
  each=$(unit_of "$1")
  if [ -z "$each" ] || [ ! -e "$DESTDIR$each" ]; then return; fi
  if reachable; then
    case $each in
      *.plist) launchctl bootout "$job.$1" ;;
      *.service) systemctl "$manager" disable --now "hive-$1" ;;
    esac >/dev/null 2>&1 || true
    say stopped "hive-$1"
  fi
  drop "$each"
}

uninstall() {
  folders=$(cat "$DESTDIR$lib/folders" 2>/dev/null || true)
  remove_unit web
  remove_unit daemon
  ( # What hive host wrote for you, if it runs what goes.  The hive's data stay.
    for=user manager=--user
    if grep -qs 'lib/hive/hive' "$DESTDIR$(unit_of host)"; then remove_unit host; fi
  )
  for name in hive hive-cli; do
    if ours "$name"; then drop "$bin/$name"; fi
  done
  for page in "$DESTDIR$man"/man[17]/hive*.[17]; do
    if grep -qs '^\.\\" From hive,' "$page"; then drop "${page#"$DESTDIR"}"; fi
  done
  for place in $completions; do
    if grep -qs 'made by: hive completion' "$DESTDIR$PREFIX/share/$place"; then drop "$PREFIX/share/$place"; fi
  done
  for name in hive hive-cli hive.py help __pycache__ venv folders hive-before.py hive-next.py \
    hive-trial.py hive-trial.json hive-trial.lock; do
    drop "$lib/$name"
  done
  printf '%s\n' "$folders" | sort -r | while IFS= read -r each; do
    if [ -n "$each" ] && rmdir "$DESTDIR$each" 2>/dev/null; then say removed "$DESTDIR$each"; fi
  done
  for each in "$config/hive.toml" "$config/hive-daemon.d" "$state"; do
    if [ -e "$DESTDIR$each" ]; then say kept "$DESTDIR$each"; fi
  done
  if [ "$for-$RUN_AS" = system-hive ] && [ -z "$DESTDIR" ] && id -u hive >/dev/null 2>&1; then
    say kept "the user hive"
  fi
}

case ${1-} in
  install)
    check
    install_programs
    install_help
    install_completions
    if [ -n "$unit" ]; then
      install_configuration
      install_unit daemon
      if [ "$for" = user ]; then install_unit web; fi  # a page is for whoever looks at it
      if [ -z "$DESTDIR" ]; then start_or_say_how; fi
    else
      say skipped "launchd: on a Mac hive runs for a user; as that user, without PREFIX: make install"
    fi
    case :$PATH: in
      *":$bin:"*) ;;
      *) if [ -z "$DESTDIR" ]; then say note "$bin is not in your PATH"; fi ;;
    esac ;;
  uninstall) uninstall ;;
  *) fail "say: make install, or: make uninstall" ;;
esac
