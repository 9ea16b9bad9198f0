// Command guest defines, starts and drives the lab's guests by hand, inside the host VM.
package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"time"

	"keybroker/e2e/domain"
)

const usage = `usage: guest define NAME...          define guests of the lab: web1, web2, web3, plain
       guest start NAME...           start them and wait until they have booted
       guest run [-u USER] NAME COMMAND   run COMMAND in one, as root or as "user"
       guest wait NAME TEXT          wait until a line with TEXT stands on its console
`

// patience is how long a guest may take for one step.
const patience = 2 * time.Minute

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	status, err := dispatch(ctx, args)
	if err != nil {
		fmt.Fprintf(os.Stderr, "guest: error: %v\n", err)
		return 1
	}
	return status
}

func dispatch(ctx context.Context, args []string) (int, error) {
	switch {
	case len(args) >= 2 && args[0] == "define":
		return 0, each(args[1:], func(s domain.Spec) error { return define(ctx, s) })
	case len(args) >= 2 && args[0] == "start":
		return 0, each(args[1:], func(s domain.Spec) error { return s.Start(ctx) })
	case len(args) == 3 && args[0] == "run":
		return runIn(ctx, "root", args[1], args[2])
	case len(args) == 5 && args[0] == "run" && args[1] == "-u":
		return runIn(ctx, args[2], args[3], args[4])
	case len(args) == 3 && args[0] == "wait":
		line, _, err := domain.Spec{Name: args[1]}.Wait(ctx, 0, args[2])
		fmt.Println(line)
		return 0, err
	}
	fmt.Fprint(os.Stderr, usage)
	return 2, nil
}

func each(names []string, do func(domain.Spec) error) error {
	for _, name := range names {
		s, err := domain.Find(name)
		if err != nil {
			return err
		}
		if err := do(s); err != nil {
			return err
		}
	}
	return nil
}

// define gives a guest that asks for keys an agent that pins the broker of this host, where one runs.
func define(ctx context.Context, s domain.Spec) error {
	if len(s.Keys) > 0 {
		if pin, err := exec.CommandContext(ctx, "keybroker", "identity").Output(); err == nil {
			s.Agent = domain.AgentConfig(strings.TrimSpace(string(pin)), s.Keys[0])
		}
	}
	return s.Define(ctx)
}

func runIn(ctx context.Context, user, name, command string) (int, error) {
	result, err := domain.Spec{Name: name}.Run(ctx, user, command)
	fmt.Print(result.Output)
	if err == nil && result.Output != "" && !strings.HasSuffix(result.Output, "\n") {
		fmt.Println()
	}
	return result.Status, err
}
