//go:build linux

// Command keybroker-agent fetches a guest's keys from the broker on its host and puts each where its configuration says: it
// opens LUKS2 volumes, fills kernel keyrings, and writes files in memory.
//
// Exit status: 0 when every key that must be there is in its sink, 1 when one is not, 2 for a wrong command line or
// configuration.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"

	"keybroker/inject"
)

const defaultConfig = "/etc/keybroker/agent.toml"

const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// options are the command line.
type options struct {
	config   string
	stateDir string
	once     bool
	forget   bool
	check    bool
	version  bool
}

const usage = `usage: keybroker-agent [flags]

Puts keys from the broker where the configuration says. In tier vm it waits for the broker on vsock port 720; in tier
snp (SEV-SNP guests) it dials port 720 of the host, and shows an attestation report.
The configuration is /etc/keybroker/agent.toml, or keybroker.tier=, keybroker.broker= and keybroker.key= on the
kernel's command line. In tier snp that file must be in the initramfs.

`

func parseOptions(args []string, stderr io.Writer) (*options, error) {
	o := &options{}
	f := flag.NewFlagSet("keybroker-agent", flag.ContinueOnError)
	f.SetOutput(io.Discard) // a mistake is said once, by run
	f.Usage = func() {}
	help := func() {
		f.SetOutput(stderr)
		io.WriteString(stderr, usage)
		f.PrintDefaults()
	}
	f.StringVar(&o.config, "config", "", "read the configuration from `FILE` and from nowhere else")
	f.StringVar(&o.stateDir, "state-dir", defaultStateDir, "keep the receiver's key and what is done in `DIR`, on a tmpfs")
	f.BoolVar(&o.once, "once", false, "exit when the keys are in their sinks, as in an initramfs")
	f.BoolVar(&o.forget, "forget", false, "with -once: wipe the receiver's key then; nothing more can be fetched in this boot")
	f.BoolVar(&o.check, "check", false, "check the configuration and exit")
	f.BoolVar(&o.version, "version", false, "print the version and exit")
	if err := f.Parse(args); errors.Is(err, flag.ErrHelp) {
		help()
		return nil, err
	} else if err != nil {
		return nil, fmt.Errorf("%w; -h shows the flags", err)
	}
	if f.NArg() > 0 {
		return nil, fmt.Errorf("argument %q: none is expected; -h shows the flags", f.Arg(0))
	}
	if o.forget && !o.once {
		return nil, errors.New("-forget goes with -once only: an agent that stays needs its key")
	}
	return o, nil
}

// several counts things: 1 key, 2 keys.
func several(n int, thing string) string {
	if n != 1 {
		thing += "s"
	}
	return fmt.Sprintf("%d %s", n, thing)
}

func run(args []string, stdout, stderr io.Writer) int {
	out := newConsole(stderr)
	o, err := parseOptions(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return exitOK
	}
	if err != nil {
		out.say("error: %v", err)
		return exitUsage
	}
	if o.version {
		fmt.Fprintln(stdout, "keybroker-agent", version())
		return exitOK
	}
	c, from, err := loadConfig(o.config, defaultConfig, "/proc/cmdline")
	if err != nil {
		out.say("error: reading the configuration: %s", strings.ReplaceAll(err.Error(), "\n", "; "))
		return exitUsage
	}
	if o.check {
		fmt.Fprintf(stdout, "%s: ok: %s, %s\n", from.name, several(len(c.Keys), "key"), several(len(c.Pins), "pin"))
		return exitOK
	}
	if err := from.check(c.Tier, signs); err != nil {
		out.say("error: reading the configuration: %v", err)
		return exitUsage
	}
	harden(out)
	if c.Tier == inject.TierSNP {
		out.say("tier snp, believing %s: from %v", shortPins(c.Pins), from)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := serve(ctx, c, o, out); err != nil {
		out.say("error: %v", err)
		if errors.Is(err, errDeadline) {
			out.say("hint: where the broker runs, `keybroker status` and `keybroker explain VM` say what it knows of this machine and what to do")
		}
		return exitFailed
	}
	return exitOK
}

// loadConfig reads the configuration from one place: the file that was named, or the default one, or the kernel's command
// line. Two that could both be meant are an error.
func loadConfig(named, fallback, cmdline string) (*config, *source, error) {
	path := named
	if path == "" {
		path = fallback
	}
	text, from, err := readConfig(path)
	if named != "" || !errors.Is(err, os.ErrNotExist) {
		if err != nil {
			return nil, nil, err
		}
		if named == "" && cmdlineSpeaks(cmdline) {
			return nil, nil, fmt.Errorf("both %s and the kernel's command line (keybroker.*) are there: remove one, or name the file with -config", path)
		}
		c, err := parseConfig(path, text)
		return c, from, err
	}
	line, err := readBounded(cmdline, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("there is no %s, and the kernel's command line cannot be read: %w", path, err)
	}
	c, err := parseCmdline(string(line))
	if err != nil {
		return nil, nil, fmt.Errorf("the kernel's command line: %w", err)
	}
	if c == nil {
		return nil, nil, fmt.Errorf("there is no %s, and the kernel's command line has no keybroker.tier=", path)
	}
	return c, &source{name: "the kernel's command line", cmdline: true}, nil
}

// readConfig reads a file, and looks where it is.
func readConfig(path string) ([]byte, *source, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	text, err := readOpen(f)
	return text, &source{name: path, unmeasured: inInitramfs(f, mountsOf)}, err
}

// cmdlineSpeaks says whether the kernel's command line has anything for this program, right or wrong.
func cmdlineSpeaks(cmdline string) bool {
	line, err := readBounded(cmdline, 0)
	if err != nil {
		return false
	}
	c, err := parseCmdline(string(line))
	return c != nil || err != nil
}

// serve is the agent's life after its configuration is known.
func serve(ctx context.Context, c *config, o *options, out *console) error {
	if err := awaitRandom(out); err != nil {
		return err
	}
	boot, err := bootID()
	if err != nil {
		return err
	}
	s, err := openState(o.stateDir, boot)
	if err != nil {
		return err
	}
	defer s.close()
	key, made, err := s.receiverKey()
	if err != nil {
		return err
	}
	if !made {
		out.say("continuing with this boot's receiver key")
	}
	if err := findSubject(c, out); err != nil {
		return err
	}
	a := newAgent(c, s, out, key)
	a.once = o.once
	a.notify = func(say string) { daemon.SdNotify(false, say) } // without a service manager there is nobody to tell
	if err := a.meetAndRun(ctx); err != nil {
		return err
	}
	if o.forget {
		return s.forget()
	}
	return nil
}

// findSubject completes the configuration by the firmware's UUID. In tier snp that is safe to take from the host: the broker
// releases nothing to a report that does not prove it.
func findSubject(c *config, out *console) error {
	from := "configured"
	if c.Subject == "" {
		c.Subject, from = firmwareUUID(), "as the firmware says"
	}
	if c.Tier != inject.TierSNP {
		return nil
	}
	if c.Subject == "" {
		return errors.New("tier snp names its own subject, and the firmware tells no UUID: set subject, or give the domain a UUID and mount sysfs on /sys")
	}
	out.say("tier snp, subject %s: %s; the report must prove it, by HOST_DATA or an ID block", c.Subject, from)
	return nil
}

func (a *agent) meetAndRun(ctx context.Context) error {
	if err := a.resume(); err != nil {
		return err
	}
	if a.once && len(a.missing()) == 0 {
		return nil
	}
	a.sayWaiting()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if a.config.Tier == inject.TierSNP {
		a.platform.look()
		go a.call(ctx, dialHost)
	} else {
		l, err := listenVsock(a.untilDeadline(ctx), a.console)
		if err != nil {
			return err
		}
		a.console.mark(stepListening)
		go a.accept(ctx, l, fromHost)
	}
	return a.run(ctx)
}

func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "(unknown)"
	}
	return info.Main.Version
}
