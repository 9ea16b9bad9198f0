package main

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"keybroker/attest/snp"
	"keybroker/internal/config"
	"keybroker/internal/daemon"
	"keybroker/internal/policy"
	"keybroker/seal"
)

func newServeCommand(g *globals) *cobra.Command {
	var listen, testRoots []string
	var logs logFlags
	c := &cobra.Command{
		Use:   "serve",
		Short: "Run the broker",
		Long: `Run the broker until SIGTERM. SIGHUP reads the policy anew and keeps the old one if the new one is wrong.
Under systemd it takes its sockets from socket units, reports readiness, and feeds the watchdog.
With --state-dir it runs beside the system's own broker, as an ordinary user.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, paths, err := g.load()
			if err != nil {
				return err
			}
			if cmd.Flags().Changed("listen") {
				if cfg.Listen, err = parseListen(listen); err != nil {
					return usageError{err}
				}
			}
			log, err := logger(g, cfg, logs)
			if err != nil {
				return usageError{err}
			}
			if err := hardenProcess(); err != nil {
				log.Warn("this process is not fully hardened", "err", err)
			}
			roots, err := trustedRoots(testRoots, log)
			if err != nil {
				return usageError{err}
			}
			reload := make(chan os.Signal, 1)
			signal.Notify(reload, unix.SIGHUP)
			return daemon.Run(cmd.Context(), daemon.Config{
				Settings: cfg, Paths: paths, Version: version(), Log: log, Reload: reload, Roots: roots,
				Describe: func(s seal.Slot) string { return describe(s.Kind, s.Params) },
				Policy:   policy.Source{File: paths.PolicyFile, Dir: paths.PolicyDir, Required: g.policy != ""},
			})
		},
	}
	c.Flags().StringArrayVar(&listen, "listen", nil, "loopback `ADDR:PORT` for services; repeat for more (default 127.0.0.1:7209 and [::1]:7209)")
	c.Flags().StringArrayVar(&testRoots, "insecure-test-roots", nil, "`LINE=FILE`: trust this chain (PEM) for reports of Milan, Genoa or Turin, in place of AMD's; for tests alone")
	logs.register(c)
	return c
}

// trustedRoots are AMD's, with those of tests in their place for the lines that are given: LINE=FILE. Every start says so, loudly.
func trustedRoots(tests []string, log *slog.Logger) ([]snp.Root, error) {
	roots := snp.AMDRoots()
	for _, t := range tests {
		line, file, _ := strings.Cut(t, "=")
		chain, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("--insecure-test-roots: expected LINE=FILE: %w", err)
		}
		root, err := snp.ParseRoot(line, chain)
		if err != nil {
			return nil, fmt.Errorf("--insecure-test-roots: %w", err)
		}
		for n := range roots {
			if roots[n].Line == line {
				roots[n] = root
			}
		}
		log.Error("INSECURE: reports of this line may be signed by a test's chain in place of AMD's; whoever has its keys gets the keys of every VM of tier snp", "line", line, "file", file)
	}
	return roots, nil
}

func parseListen(addresses []string) ([]netip.AddrPort, error) {
	var all []netip.AddrPort
	for _, s := range addresses {
		a, err := config.ParseListen(s)
		if err != nil {
			return nil, err
		}
		all = append(all, a)
	}
	return all, nil
}

// logFlags are what a command that runs on is told about its log.
type logFlags struct{ format, level string }

func (f *logFlags) register(c *cobra.Command) {
	c.Flags().StringVar(&f.format, "log-format", "", "text or json (default text)")
	c.Flags().StringVar(&f.level, "log-level", "", "debug, info, warn or error (default info)")
	c.RegisterFlagCompletionFunc("log-format", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	c.RegisterFlagCompletionFunc("log-level", cobra.FixedCompletions([]string{"debug", "info", "warn", "error"}, cobra.ShellCompDirectiveNoFileComp))
}

// logger writes to stderr; under systemd that is the journal, which adds the time itself.
func logger(g *globals, cfg *config.Config, f logFlags) (*slog.Logger, error) {
	options := &slog.HandlerOptions{Level: cfg.Log.Level}
	if f.level != "" {
		var l slog.Level
		if err := l.UnmarshalText([]byte(f.level)); err != nil {
			return nil, fmt.Errorf("--log-level %q: expected debug, info, warn or error", f.level)
		}
		options.Level = l
	}
	switch {
	case f.format == "json", f.format == "" && cfg.Log.JSON:
		return slog.New(slog.NewJSONHandler(g.stderr, options)), nil
	case f.format != "" && f.format != "text":
		return nil, fmt.Errorf("--log-format %q: expected text or json", f.format)
	}
	if os.Getenv("JOURNAL_STREAM") != "" {
		options.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		}
	}
	return slog.New(slog.NewTextHandler(g.stderr, options)), nil
}
