// Command keybroker gives every service and virtual machine on a hypervisor host its own encryption key when it starts.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"time"
	"unicode"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"keybroker/attest/snp"
	"keybroker/internal/config"
)

// Exit statuses of keybroker; they are documented and stay.
const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = 2
)

// globals are the flags that every command takes, and the streams that it writes to.
type globals struct {
	config   string // --config: broker.toml
	policy   string // --policy: policy.toml
	stateDir string // --state-dir: everything, sockets and audit included, is below it
	stdin    io.Reader
	stdout   io.Writer
	stderr   io.Writer
	roots    []snp.Root    // that attestation reports must lead to; nil: AMD's
	syslog   string        // the system log's socket; "" writes to none
	began    time.Duration // when this process was started, a hypervisor.BootTime; 0: as the kernel says
}

// paths says where this broker's files and sockets are.
func (g *globals) paths() (config.Paths, error) {
	p := config.DefaultPaths()
	if g.stateDir != "" {
		var err error
		if p, err = config.PathsUnder(g.stateDir); err != nil {
			return config.Paths{}, err
		}
	}
	if g.config != "" {
		p = p.WithConfigFile(g.config)
	}
	if g.policy != "" {
		p = p.WithPolicyFile(g.policy)
	}
	return p, nil
}

// load reads broker.toml. A file that --config names must exist.
func (g *globals) load() (*config.Config, config.Paths, error) {
	p, err := g.paths()
	if err != nil {
		return nil, p, err
	}
	c, err := config.Load(g.config, p)
	return c, p, err
}

// warn and hint write one line each for the person at the terminal.
func (g *globals) warn(format string, args ...any) {
	fmt.Fprintf(g.stderr, "keybroker: warning: "+format+"\n", args...)
}

func (g *globals) hint(format string, args ...any) {
	fmt.Fprintf(g.stderr, "keybroker: hint: %s\n", g.here(fmt.Sprintf(format, args...)))
}

// stopBroker ends the system's own broker for as long as somebody wants it to: each socket that is left would start it again.
const stopBroker = "`systemctl stop keybroker.service keybroker.socket keybroker-hook.socket keybroker-admin.socket keybroker-unlock.socket`"

// here makes the commands in an advice those for the broker of --state-dir, of which systemd knows nothing.
func (g *globals) here(advice string) string {
	flag := g.stateDirFlag()
	if flag == "" {
		return advice
	}
	return strings.NewReplacer(
		"`keybroker "+flag, "`keybroker "+flag,
		"`keybroker ", "`keybroker "+flag,
		"`systemctl start keybroker`", "`keybroker "+flag+"serve`",
		"`journalctl -u keybroker`", "what its `keybroker serve` writes",
		stopBroker, "end its `keybroker serve`",
	).Replace(advice)
}

// stateDirFlag is what names this broker in commands: "--state-dir X ", or nothing for the system's own.
func (g *globals) stateDirFlag() string {
	switch {
	case g.stateDir == "":
		return ""
	case strings.ContainsFunc(g.stateDir, func(c rune) bool {
		return !unicode.IsLetter(c) && !unicode.IsDigit(c) && !strings.ContainsRune("/._-+=@:,~%", c)
	}):
		return "--state-dir '" + strings.ReplaceAll(g.stateDir, "'", `'\''`) + "' "
	}
	return "--state-dir " + g.stateDir + " "
}

// usageError marks a mistake in the command line; it exits with status 2.
type usageError struct{ error }

// hintedError carries what the user can do about an error.
type hintedError struct {
	error
	hint string
}

func (e hintedError) Unwrap() error { return e.error }

// An exitStatus ends a command with a status of its own when its output has already said why.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("failed with status %d", int(s)) }

// A statusError is an error that ends a command with a status of its own.
type statusError struct {
	error
	status exitStatus
}

func (e statusError) Unwrap() error { return e.error }

// errSilent ends a command with status 1 when its output has already said why.
var errSilent = errors.New("failed")

func main() {
	g := &globals{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, syslog: "/dev/log"}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	status := run(ctx, g, os.Args[1:])
	stop()
	os.Exit(status)
}

// run executes one command line and returns its exit status.
func run(ctx context.Context, g *globals, args []string) int {
	root := newRootCommand(g)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	status := exitStatus(exitFailure)
	if errors.As(err, &status) {
		return int(status)
	}
	if !errors.Is(err, errSilent) {
		fmt.Fprintf(g.stderr, "keybroker: error: %s\n", g.here(err.Error()))
	}
	if h := (hintedError{}); errors.As(err, &h) {
		g.hint("%s", h.hint)
	}
	if s := (statusError{}); errors.As(err, &s) {
		return int(s.status)
	}
	if errors.As(err, &usageError{}) {
		return exitUsage
	}
	return exitFailure
}

func newRootCommand(g *globals) *cobra.Command {
	root := &cobra.Command{
		Use:           "keybroker",
		Version:       version(),
		Short:         "Give every service and virtual machine on this host its own encryption key, and nobody else's",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("unknown command %q; `keybroker help` lists the commands", args[0])}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetVersionTemplate(versionLine())
	root.SetIn(g.stdin)
	root.SetOut(g.stdout)
	root.SetErr(g.stderr)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w; see `%s --help`", err, cmd.CommandPath())}
	})
	flags := root.PersistentFlags()
	flags.StringVar(&g.config, "config", "", "configuration `FILE` (default /etc/keybroker/broker.toml)")
	flags.StringVar(&g.policy, "policy", "", "policy `FILE` (default /etc/keybroker/policy.toml, with policy.d beside it)")
	flags.StringVar(&g.stateDir, "state-dir", "", "keep everything, sockets and audit included, below `DIR`")
	root.AddCommand(commands(g)...)
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		strict(c)
	}
	return root
}

// strict makes every mistake in a command's line, and below it, a usageError: cobra itself lets unknown subcommands pass, and does
// not tell its own checks of flags from the command's failure.
func strict(c *cobra.Command) {
	check := c.Args
	switch {
	case c.Name() == "help":
		check = helpTopic
	case c.HasSubCommands():
		check, c.RunE = cobra.NoArgs, func(c *cobra.Command, _ []string) error { return c.Help() }
	case check == nil:
		check = cobra.ArbitraryArgs
	}
	c.Args = func(c *cobra.Command, args []string) error {
		err := check(c, args)
		if err != nil && !errors.As(err, &usageError{}) && c.Runnable() && !c.HasSubCommands() {
			err = fmt.Errorf("expected %q, got %s", strings.TrimSuffix(c.CommandPath(), c.Name())+c.Use, several(len(args), "argument"))
		}
		if f := c.Flags().Lookup("state-dir"); err == nil && f != nil && f.Changed && f.Value.String() == "" {
			err = errors.New("--state-dir: expected the name of a folder, got nothing")
		}
		err = cmp.Or(err, c.ValidateRequiredFlags(), c.ValidateFlagGroups())
		if err == nil || errors.As(err, &usageError{}) {
			return err
		}
		return usageError{fmt.Errorf("%w; see `%s --help`", err, c.CommandPath())}
	}
	for _, sub := range c.Commands() {
		strict(sub)
	}
}

// helpTopic wants the words after help to be a command.
func helpTopic(c *cobra.Command, args []string) error {
	found, rest, err := c.Root().Find(args)
	if err == nil && len(rest) == 0 {
		return nil
	}
	return usageError{fmt.Errorf("there is no command %q; `%s` lists those that there are", strings.Join(append(strings.Fields(found.CommandPath()), rest...)[1:], " "),
		strings.Replace(found.CommandPath(), "keybroker", "keybroker help", 1))}
}
